"""Several processes of one participant share each batch of a large model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.errors import ConfigError, TaskError
from tests.learning.test_large_models import classifier, language_model, reviews, same, saved
from tests.learning.test_resumed_descent import Killed, alike, told
from workers.devices import There
from workers.hf.base import Base
from workers.hf.definition import HfTask
from workers.hf.task import HfBound
from workers.hf.text import Examples
from workers.modules import use_threads
from workers.task import Arrays, TrainConfig
from workers.tasks import find_task

pytestmark = pytest.mark.timeout(300)

CLIPPED = {"clip": 0.5, "micro_batch": 3, "class_weights": "balanced", "l2": 0.01, "max_steps": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Models without dropout: it draws otherwise in each process."""
    use_threads()
    found = saved(tmp_path_factory.mktemp("models"))
    for folder in found:
        config = json.loads((folder / "config.json").read_text())
        dropout = {name: 0.0 for name in config if "drop" in name and isinstance(config[name], float)}
        (folder / "config.json").write_text(json.dumps(config | dropout))
    return found


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def bound(task: HfTask, processes: int, ends: ExitStack, count: int = 21) -> HfBound:
    found = task.on("cpu", processes).bind(reviews(count))
    if found.model.crew:
        ends.callback(found.model.crew.end)
    return found


def without_dropout(folder: Path) -> HfTask:
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}
    return classifier(folder, adapter=adapter)


@pytest.mark.slow
def test_two_train_as_one_does_within_rounding(folders: tuple[Path, Path], ends: ExitStack) -> None:
    task = without_dropout(folders[0])
    alone, two = (bound(task, processes, ends) for processes in (1, 2))
    config = TrainConfig(1, 7, CLIPPED)
    expected, found = (each.train(each.initial(), config) for each in (alone, two))
    assert not same(expected.arrays, alone.initial())
    for name, values in expected.arrays.items():
        np.testing.assert_allclose(found.arrays[name], values, atol=2e-5, err_msg=name)
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-5)
    gradients = [each.train(expected.arrays, replace(config, wants="gradient")) for each in (alone, two)]
    for name, values in gradients[0].arrays.items():
        np.testing.assert_allclose(gradients[1].arrays[name], values, atol=1e-6)


@pytest.mark.slow
def test_more_processes_than_examples_are_of_no_harm(folders: tuple[Path, Path], ends: ExitStack) -> None:
    task = language_model(folders[1], adapter=None)
    alone, three = (bound(task, processes, ends, count=9) for processes in (1, 3))
    config = TrainConfig(1, 7, {"batch_size": 2, "max_steps": 2, "optimiser": "sgd", "lr": 0.05})
    expected, found = (each.train(each.initial(), config) for each in (alone, three))
    assert not same(expected.arrays, alone.initial())
    for name, values in expected.arrays.items():
        np.testing.assert_allclose(found.arrays[name], values, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_it_repeats_itself_and_goes_on_from_a_save_with_dropout(tmp_path: Path, ends: ExitStack) -> None:
    """What helpers drop follows from the first one's generator, which is saved."""
    task = classifier(saved(tmp_path)[0])
    two = bound(task, 2, ends)
    train: dict[str, Any] = {"max_steps": 4, "clip": 0.5}
    saves: list[Arrays] = []
    expected = two.train(two.initial(), told(saves, **train))
    assert alike(two.train(two.initial(), told([], **train)), expected)
    begun: list[Arrays] = []
    with pytest.raises(Killed):
        two.train(two.initial(), told(begun, 2, **train))
    again = bound(replace(task, name=task.name), 2, ends)
    assert alike(again.train(again.initial(), told([], resume=begun[-1], **train)), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "fate"),
    [(signal.SIGKILL, "helper 1 ended with code -9"), (signal.SIGSTOP, "a helper did not do its part")],
)
def test_a_helper_that_is_killed_or_hangs_fails_the_work_and_the_next_has_others(
    folders: tuple[Path, Path], ends: ExitStack, monkeypatch: pytest.MonkeyPatch, sent: int, fate: str
) -> None:
    monkeypatch.setattr("workers.hf.crew.STEP_S", 15.0)
    two = bound(without_dropout(folders[0]), 2, ends)
    config = TrainConfig(1, 7, {"max_steps": 3})
    expected = two.train(two.initial(), config)
    assert two.model.crew
    helper = two.model.crew.processes[0]
    asked = iter(range(10))

    def at_the_second_step() -> bool:
        if next(asked) == 1:
            os.kill(helper.pid, sent)
        return False

    with pytest.raises(TaskError, match=rf"{fate} .*: see what it said, or set site.processes = 1"):
        two.train(two.initial(), replace(config, should_stop=at_the_second_step))
    assert not two.model.crew.processes
    assert same(two.train(two.initial(), config).arrays, expected.arrays)
    assert two.model.crew.processes[0].pid != helper.pid


@pytest.mark.slow
def test_one_that_cannot_load_the_base_fails_the_work(folders: tuple[Path, Path], ends: ExitStack) -> None:
    two = bound(without_dropout(folders[0]), 2, ends)
    assert two.model.crew
    two.model.crew.hello = {**two.model.crew.hello, "where": str(folders[0] / "missing")}
    with pytest.raises(TaskError, match="helper 1"):
        two.train(two.initial(), TrainConfig(1, 7, {"max_steps": 1}))
    assert not two.model.crew.processes


OWNER = """
import sys
from tests.learning.test_crew import without_dropout
from tests.learning.test_large_models import reviews
from workers.task import TrainConfig
from pathlib import Path
two = without_dropout(Path(sys.argv[1])).on("cpu", 2).bind(reviews(8))
two.train(two.initial(), TrainConfig(1, 7, {"max_steps": 1}))
print(two.model.crew.processes[0].pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "ends"])
def test_helpers_end_with_their_participant(folders: tuple[Path, Path], how: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folders[0])], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert owner.stdin
    assert owner.stdout
    helper = int(owner.stdout.readline())
    assert Path(f"/proc/{helper}").exists()
    if how == "killed":
        owner.kill()
    owner.stdin.close()
    owner.wait(60)
    owner.stdout.close()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{helper}").exists() and "Z" not in Path(f"/proc/{helper}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_examples_travel_to_helpers_as_they_are(folders: tuple[Path, Path]) -> None:
    import torch

    rows = without_dropout(folders[0]).bind(reviews(6)).rows
    for chosen in ([4, 1], []):
        found = Examples.from_arrays(rows.taken(torch.tensor(chosen, dtype=torch.int64)))
        assert len(found) == len(chosen)
        for at, row in enumerate(chosen):
            assert found.targets[at] == rows.targets[row]
            assert all(np.array_equal(found.columns[name][at], rows.columns[name][row]) for name in rows.columns)


def test_there_must_be_a_device_for_each(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from workers.hf import base

    monkeypatch.setattr("workers.devices.there", lambda: There(cuda=2))
    there = Base(where=folders[0], kind="classifier", processes=2)
    crew = base._crew(there, folders[0], "", torch.device("cuda", 0))
    assert crew.devices == ["cuda:0", "cuda:1"]
    with pytest.raises(ConfigError, match="'cuda:2' is not there"):
        base._crew(replace(there, processes=3), folders[0], "", torch.device("cuda", 0))
    with pytest.raises(ConfigError, match="MPS is one device"):
        base._crew(there, folders[0], "", torch.device("mps"))
    for name in ("heart", "digits-bayes"):
        with pytest.raises(ConfigError, match=r"site\.processes"):
            find_task(name).on("", 2)
