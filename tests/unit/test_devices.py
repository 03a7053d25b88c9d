"""Which device is chosen, whatever this machine has."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from broker.errors import ConfigError
from tests.learning.test_torch_task import TOY
from tests.unit.test_assignment import told
from workers.assignment import Assignment, Holding
from workers.devices import CPU, There, draws, find, moved, reseed, set_draws
from workers.modules import seeded
from workers.tasks import find_task

NOTHING, TWO, APPLE = There(), There(cuda=2), There(mps=True)


@pytest.mark.parametrize(
    ("asked", "seen", "found"),
    [
        ("auto", NOTHING, "cpu"),
        ("auto", TWO, "cuda:0"),
        ("auto", APPLE, "mps"),
        ("auto", There(1, mps=True), "cuda:0"),
        ("cpu", TWO, "cpu"),
        ("cuda", TWO, "cuda:0"),
        ("cuda:1", TWO, "cuda:1"),
        ("mps", APPLE, "mps"),
    ],
)
def test_a_device_that_is_there_is_taken(asked: str, seen: There, found: str) -> None:
    assert str(find(asked, seen)) == found


@pytest.mark.parametrize(
    ("asked", "seen", "said"),
    [
        ("cuda", NOTHING, "sees cpu; choose one of them or auto, or install the driver"),
        ("cuda", APPLE, "sees mps, cpu"),
        ("cuda:2", TWO, "sees cuda:0, cuda:1, cpu"),
        ("mps", TWO, "'mps' is not there"),
        ("gpu", TWO, "none of auto, cpu, cuda, cuda:N and mps"),
        ("cuda:one", TWO, "none of auto"),
    ],
)
def test_one_that_is_not_there_is_refused(asked: str, seen: There, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find(asked, seen)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_site_is_told_at_once_that_its_device_is_missing() -> None:
    with pytest.raises(ConfigError, match="device 'cuda' is not there"):
        Assignment(Holding("p01", "tests.learning.test_torch_task:TOY", device="cuda")).check()
    with pytest.raises(ConfigError, match="on the CPU"):
        find_task("digits-bayes").on("cuda")


def test_a_site_may_name_the_cpu_and_by_default_the_task_says() -> None:
    for device in ("", "cpu", "auto"):
        assignment = Assignment(Holding("p01", "heart", "all", device=device))
        assignment.check()
        assert assignment(told()).name == "heart"
    assert find_task("digits-bayes").on("auto") == find_task("digits-bayes")
    assert TOY.on("") is TOY


def test_the_cpu_has_no_generator_beside_torchs() -> None:
    assert draws(CPU) is None
    before = torch.get_rng_state()
    reseed(CPU, 3)
    set_draws(CPU, before)
    assert torch.equal(torch.get_rng_state(), before)
    values = torch.zeros(2)
    assert moved(values, CPU) is values


def test_another_device_draws_under_the_seed_and_goes_on_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS in name only: its generator is a number here."""
    state = [torch.tensor([5], dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.__setitem__(0, new))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: state.__setitem__(0, torch.tensor([seed])))
    mps = torch.device("mps")
    with suppress(KeyError), seeded(9, mps):
        assert draws(mps) == torch.tensor([9])
        raise KeyError
    assert draws(mps) == torch.tensor([5])
