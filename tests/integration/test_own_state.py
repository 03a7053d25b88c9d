"""What stays with participants, and control variates on their ways down and up, in whole runs: the same bits
whatever the way, and whatever dies."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from aggregator.job import Job
from aggregator.settings import RunSettings
from broker import tensors
from broker.errors import ConfigError, TaskError
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.objects import Folder
from broker.store import Store
from broker.topology import Topology
from fluffle.chaos.task import Pull
from tests.federation import Federation, names, settings
from tests.rabbit_node import Rabbit
from workers.journal import FileJournal, Journal, MemoryJournal
from workers.kept import Kept
from workers.link import WorkerSettings
from workers.task import Evaluation, TrainConfig, TrainResult
from workers.trainer import Sizes
from workers.worker import Site, Worker, always

ROUNDS, SIZE = 4, 600
SCAFFOLD = {"strategy": {"name": "scaffold"}}
OWN = {"strategy": {"name": "scaffold"}, "personal": {"local": "b*", "ditto": 0.5}}
STREAMED = {"strategy": {"name": "diloco", "fragments": 2}, "personal": {"ditto": 0.5}}


class Two(Pull):
    """`Pull`, with a bias of its own at each participant, and a state: how often it trained."""

    def initial(self) -> tensors.Arrays:
        return {**super().initial(), "bias": np.zeros(3, np.float32)}

    def train(self, arrays: tensors.Arrays, config: TrainConfig) -> TrainResult:
        result = super().train(arrays, config)
        assert (config.origin is not None) == (config.settings.get("mu") == 0.5)
        if config.origin is not None:
            result.arrays["w"] -= (result.arrays["w"] - config.origin["w"]) / 4
        result.arrays["bias"] = arrays["bias"] + self.point[:3]
        times = config.state.get("times", np.array(0)) + 1
        return TrainResult(result.arrays, 10, result.metrics, step_sum=0.5, state={"times": times})

    def evaluate(self, arrays: tensors.Arrays) -> Evaluation:
        loss = float(np.square(arrays["w"] - self.point).mean())
        return Evaluation({"loss": loss, "bias": float(arrays["bias"][0])}, 10)


class OfTwo(Federation):
    def job(self, run: RunSettings, **options: object) -> Job:
        return replace(super().job(run, **options), initial=Two("p00", self.size).initial)


def federation(
    directory: Path, own: bool = False, inline_bytes: int = 256 << 10, store: Store | None = None
) -> Federation:
    broker = MemoryBroker(Topology("default").access)
    sizes = Sizes(inline_bytes=inline_bytes)
    kind = OfTwo if own else Federation
    joined = kind(broker, directory, names(3), size=SIZE, heartbeat_s=0.2, sizes=sizes, store=store)
    joined.tasks = {name: Two(name, SIZE) for name in names(3)} if own else {}
    return joined


def digests(head: HeadRecord) -> list[str]:
    return [body.sha256 for body in head.bodies]


@pytest.fixture
async def whole(tmp_path: Path) -> list[str]:
    found = digests(await federation(tmp_path / "whole").run(settings(3, ROUNDS, **SCAFFOLD)))
    assert len(found) == 2
    return found


@pytest.mark.parametrize(
    ("inline_bytes", "codec", "ways"),
    [
        (1 << 20, "none", ["inline", "inline"]),
        (2600, "none", ["inline", "inline"]),
        (2480, "none", ["stream", "inline"]),
        (0, "none", ["stream", "stream"]),
        (0, "none+zstd", ["stream", "stream"]),
    ],
)  # fmt: skip
async def test_control_variates_go_where_models_go_and_change_no_bit(
    whole: list[str], tmp_path: Path, inline_bytes: int, codec: str, ways: list[str]
) -> None:
    run = settings(3, ROUNDS, broker={"inline_bytes": inline_bytes}, codec={"up": codec}, **SCAFFOLD)
    joined = federation(tmp_path, inline_bytes=inline_bytes)
    head = await joined.run(run)
    assert [body.where for body in head.bodies] == ways
    assert digests(head) == whole
    assert [d.verdict for d in await joined.ledger()] == ["counted"] * 3 * ROUNDS


@pytest.fixture
def share(tmp_path: Path) -> Path:
    folder = tmp_path / "share"
    folder.mkdir()
    return folder


async def test_through_a_store(whole: list[str], share: Path, tmp_path: Path) -> None:
    joined = federation(tmp_path / "run", inline_bytes=0, store=Store(Folder(share), "share"))
    head = await joined.run(settings(3, ROUNDS, broker={"inline_bytes": 0}, **SCAFFOLD))
    assert [body.where for body in head.bodies] == ["url", "url"]
    assert digests(head) == whole


@pytest.mark.xdist_group("rabbitmq")
@pytest.mark.parametrize("inline_bytes", [0, 1 << 20])
async def test_over_rabbitmq(rabbit: Rabbit, whole: list[str], tmp_path: Path, inline_bytes: int) -> None:
    sizes = Sizes(inline_bytes=inline_bytes)
    joined = Federation(rabbit.broker(), tmp_path / "run", names(3), SIZE, 0.2, sizes, rabbit.topology())
    run = settings(3, ROUNDS, broker={"inline_bytes": inline_bytes}, **SCAFFOLD)
    assert digests(await joined.run(run)) == whole


@pytest.mark.xdist_group("rabbitmq")
async def test_fragments_over_rabbitmq(rabbit: Rabbit, tmp_path: Path) -> None:
    run = settings(3, ROUNDS, broker={"inline_bytes": 0}, **STREAMED)
    quiet = await federation(tmp_path / "quiet").run(run)
    sizes = Sizes(inline_bytes=0)
    joined = Federation(rabbit.broker(), tmp_path / "run", names(3), SIZE, 0.2, sizes, rabbit.topology())
    assert digests(await joined.run(run)) == digests(quiet)


async def test_the_mean_of_the_kept_control_variates_is_the_servers(tmp_path: Path) -> None:
    joined = federation(tmp_path)
    head = await joined.run(settings(3, ROUNDS, **SCAFFOLD))
    kept = []
    for journal in joined.journals.values():
        own = await journal.own()
        assert own
        assert own.round == ROUNDS
        kept.append(tensors.decode(own.blob)["control/w"])
    assert head.state
    path = tmp_path / "checkpoints" / f"{head.state.sha256}.safetensors"
    state = tensors.decode(await asyncio.to_thread(path.read_bytes))
    np.testing.assert_allclose(state["control/w"], np.mean(kept, axis=0), atol=1e-6)


async def test_training_that_does_not_fit_is_refused_before_the_run(tmp_path: Path) -> None:
    run = settings(3, 1, **SCAFFOLD).model_copy(update={"train": {"momentum": 0.9}})
    with pytest.raises(ConfigError, match=r"train\.momentum is 0\.9"):
        federation(tmp_path).aggregator(run)


@pytest.mark.parametrize(("local", "what"), [("*", "every tensor"), ("head.*", "no tensor")])
async def test_patterns_that_leave_nothing_are_refused(tmp_path: Path, local: str, what: str) -> None:
    run = settings(3, 1, personal={"local": local})
    with pytest.raises(ConfigError, match=f"names {what} of the model, whose tensors are steps, w"):
        await federation(tmp_path).aggregator(run).run()


# -- who dies, and what is lost -----------------------------------------------------------------------------------


class Died(BaseException):
    """The process is gone."""


@dataclass
class Mortal:
    """A worker with its journal on disk. It dies when it says `event` for the n-th time, and is started again."""

    crowd: Federation
    journal: Journal
    event: str = ""
    nth: int = 0
    said: list[str] = field(default_factory=list)

    def hear(self, event: str, **fields: object) -> None:
        self.said.append(event)
        if event == self.event and self.said.count(event) == self.nth:
            raise Died

    def worker(self) -> Worker:
        waits = WorkerSettings(0.2, patience_s=5.0, retry_s=0.1, on_notice=self.hear)
        if isinstance(self.journal, FileJournal):
            self.journal = FileJournal(self.journal._order.parent)  # another process knows only the disk
        return Worker(
            Site("p03", always(Two("p03", SIZE)), self.journal), self.crowd.broker, self.crowd.topology, waits
        )

    async def run(self) -> None:
        try:
            self.now = self.worker()
            await self.now.run()
        except* Died:
            for connection in self.crowd.broker.connections:  # type: ignore[attr-defined]
                if connection.user == "p03":
                    connection.abort()
            self.now = self.worker()
            await self.now.run()


async def run_with(mortal: Mortal, run: RunSettings) -> HeadRecord:
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        mortal.crowd.participants = names(2)
        async with mortal.crowd.workers():
            running = group.create_task(mortal.run())
            head = await mortal.crowd.aggregator(run).run()
            mortal.now.stop()
            await running
    return head


def run_of(**more: dict[str, object]) -> RunSettings:
    return settings(3, ROUNDS, evaluation={"mode": "federated"}, **{**OWN, **more})


async def undisturbed(directory: Path, **more: dict[str, object]) -> tuple[list[str], Kept | None]:
    mortal = Mortal(federation(directory, own=True), MemoryJournal())
    found = digests(await run_with(mortal, run_of(**more)))
    return found, await mortal.journal.own()


@pytest.mark.parametrize(
    ("event", "nth", "more"),
    [
        *(("work_begun", 3, {}), ("work_done", 3, {}), ("update_sent", 5, {}), ("update_settled", 1, {})),
        *(("work_begun", 5, STREAMED), ("update_sent", 3, STREAMED)),
    ],
)
async def test_a_worker_that_dies_at_any_step_keeps_what_is_its_own(
    tmp_path: Path, event: str, nth: int, more: dict[str, dict[str, object]]
) -> None:
    """Model, state and what the worker keeps have the undisturbed run's bits."""
    expected, own = await undisturbed(tmp_path / "quiet", **more)
    journal = FileJournal(tmp_path / "journal")
    mortal = Mortal(federation(tmp_path, own=True), journal, event, nth)
    assert digests(await run_with(mortal, run_of(**more))) == expected
    assert mortal.said.count(event) >= nth
    assert not {"own_state_lost", "own_state_dropped"}.intersection(mortal.said)
    kept = await FileJournal(tmp_path / "journal").own()
    assert kept
    assert own
    assert (kept.round, bytes(kept.blob)) == (own.round, bytes(own.blob))


class Forgetful(FileJournal):
    """Its files are lost after the second update; then it keeps them again."""

    lost = False

    async def own(self) -> Kept | None:
        own = await super().own()
        if own is not None and own.round == 2 and not self.lost:
            self.lost = True
            await self.drop_own()
            return None
        return own


async def test_a_lost_state_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    expected, _ = await undisturbed(tmp_path / "quiet")
    mortal = Mortal(federation(tmp_path, own=True), MemoryJournal())
    journal = Forgetful(tmp_path / "journal")
    mortal.worker = lambda: Worker(  # type: ignore[method-assign]
        Site("p03", always(Two("p03", SIZE)), journal), mortal.crowd.broker, mortal.crowd.topology,
        WorkerSettings(0.2, patience_s=5.0, retry_s=0.1, on_notice=mortal.hear),
    )  # fmt: skip
    head = await run_with(mortal, run_of())
    assert mortal.said.count("own_state_lost") == 2, "when it evaluates, and when it trains"
    assert head.round == ROUNDS
    assert digests(head) != expected, "that the tests above can fail"


async def test_a_damaged_or_foreign_state_is_dropped_and_told(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "journal")
    crowd = federation(tmp_path, own=True)
    mortal = Mortal(crowd, journal)
    await run_with(mortal, run_of())
    mortal.crowd = federation(tmp_path / "next", own=True)
    await run_with(mortal, run_of(run_id="run-2"))  # type: ignore[arg-type]
    assert mortal.said.count("own_state_dropped") == 1
    await asyncio.to_thread((tmp_path / "journal" / "own.kept").write_bytes, b"junk")
    assert await FileJournal(tmp_path / "journal").own() is None
    assert await asyncio.to_thread((tmp_path / "journal" / "own.damaged").exists)


# -- what stays, and what is measured -----------------------------------------------------------------------------


async def test_local_tensors_never_travel_and_the_personal_model_is_measured(tmp_path: Path) -> None:
    crowd = federation(tmp_path, own=True)
    run = settings(3, ROUNDS, evaluation={"mode": "federated"}, personal={"local": "b*"})
    head = await crowd.run(run)
    assert head.model
    path = tmp_path / "checkpoints" / f"{head.model.sha256}.safetensors"
    model = tensors.decode(await asyncio.to_thread(path.read_bytes))
    assert not model["bias"].any(), "it is as it began"
    points = [crowd.tasks[name].point[0] for name in names(3)]
    assert head.metrics["bias"] == pytest.approx(ROUNDS * np.mean(points), rel=1e-5)
    for name in names(3):
        own = await crowd.journals[name].own()
        assert own
        kept = tensors.decode(own.blob)
        np.testing.assert_allclose(kept["local/bias"], ROUNDS * crowd.tasks[name].point[:3], rtol=1e-5)
        assert kept["task/times"] == ROUNDS


async def test_with_ditto_the_global_model_is_fedavgs_and_the_personal_one_is_measured(tmp_path: Path) -> None:
    run = settings(3, ROUNDS, evaluation={"mode": "federated"})
    plain = await federation(tmp_path / "plain", own=True).run(run)
    crowd = federation(tmp_path, own=True)
    ditto = await crowd.run(run.model_copy(update={"personal": settings(3, personal={"ditto": 0.5}).personal}))
    assert digests(ditto) == digests(plain)
    losses = []
    for name in names(3):
        own = await crowd.journals[name].own()
        assert own
        personal = tensors.decode(own.blob)["ditto/w"]
        losses.append(float(np.square(personal - crowd.tasks[name].point).mean()))
    assert ditto.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert ditto.metrics["loss"] < 0.8 * plain.metrics["loss"]


async def test_an_update_with_a_local_tensor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a participant sends: what stays is no part of the model."""
    monkeypatch.setattr("workers.trainer.shared", lambda model, local: model)
    with pytest.raises(ExceptionGroup) as failures:
        await federation(tmp_path, own=True).run(settings(3, 1, personal={"local": "b*"}))
    [failure] = failures.value.exceptions
    assert isinstance(failure, TaskError)
    assert "unknown tensor 'bias'" in str(failure)
