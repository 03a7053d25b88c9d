"""A strategy's state travels with the model, in the head record: whoever leads next goes on with both, or with
neither."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest

from aggregator.archive import Archive
from aggregator.checkpoints import Checkpoints
from aggregator.settings import RunSettings
from broker.errors import ModelMissing, StateError, TaskError, TransportError
from broker.head import HeadRecord
from broker.memory import MemoryBroker
from broker.objects import Folder
from broker.store import Store
from broker.topology import AGGREGATOR, Topology
from tests.federation import Federation, names, settings
from tests.rabbit_node import Rabbit
from workers.trainer import Sizes

ADAM = {"strategy": {"name": "fedadam"}}
INLINE = settings(3, 4, **ADAM)
STREAM = settings(3, 4, broker={"inline_bytes": 0}, **ADAM)
ONLY_STATE = settings(3, 4, broker={"inline_bytes": 3000}, **ADAM)  # the model is half as large as its moments


def federation(directory: Path, store: Store | None = None, inline_bytes: int = 256 << 10) -> Federation:
    broker = MemoryBroker(Topology("default").access)
    sizes = Sizes(inline_bytes=inline_bytes)
    return Federation(broker, directory, names(3), size=600, heartbeat_s=0.2, sizes=sizes, store=store)


def digests(head: HeadRecord) -> list[str]:
    assert len(head.bodies) == 2
    return [body.sha256 for body in head.bodies]


def first(run: RunSettings, rounds: int) -> RunSettings:
    """The same run, stopped earlier."""
    return run.model_copy(update={"stop": run.stop.model_copy(update={"rounds": rounds})})


@pytest.fixture
async def whole(tmp_path: Path) -> list[str]:
    return digests(await federation(tmp_path / "whole").run(INLINE))


@pytest.mark.parametrize(
    ("run", "ways"),
    [(INLINE, ["inline", "inline"]), (ONLY_STATE, ["inline", "stream"]), (STREAM, ["stream", "stream"])],
    ids=["inline", "only the state in a stream", "both in streams"],
)
async def test_it_goes_where_large_models_go_and_changes_no_bit(
    whole: list[str], tmp_path: Path, run: RunSettings, ways: list[str]
) -> None:
    head = await federation(tmp_path, inline_bytes=run.broker.inline_bytes).run(run)
    assert [body.where for body in head.bodies] == ways
    assert digests(head) == whole


@pytest.mark.parametrize("run", [INLINE, ONLY_STATE, STREAM], ids=["inline", "only state", "streams"])
async def test_a_run_goes_on_from_its_checkpoints_once_the_broker_lost_everything(
    whole: list[str], tmp_path: Path, run: RunSettings
) -> None:
    await federation(tmp_path, inline_bytes=run.broker.inline_bytes).run(first(run, 2))
    head = await federation(tmp_path, inline_bytes=run.broker.inline_bytes).run(run, from_checkpoint=True)
    assert digests(head) == whole


async def test_without_its_state_a_checkpoint_is_not_whole(whole: list[str], tmp_path: Path) -> None:
    """It goes on from the version before, and comes to the same."""
    head = await federation(tmp_path, inline_bytes=0).run(first(STREAM, 3))
    assert head.state

    def damage(sha256: str) -> int:
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        checkpoints.path(sha256).write_bytes(b"damaged")
        newest = checkpoints.newest()
        return newest.version if newest else -1

    assert await asyncio.to_thread(damage, head.state.sha256) == 2
    assert digests(await federation(tmp_path, inline_bytes=0).run(STREAM, from_checkpoint=True)) == whole


@pytest.fixture
def share(tmp_path: Path) -> Path:
    folder = tmp_path / "share"
    folder.mkdir()
    return folder


async def test_in_the_store_it_is_kept_while_a_record_names_it(
    whole: list[str], share: Path, tmp_path: Path
) -> None:
    joined = federation(tmp_path / "run", Store(Folder(share), "share"), inline_bytes=0)
    head = await joined.run(settings(3, 4, broker={"inline_bytes": 0}, store={"orphan_s": 0.01}, **ADAM))
    assert [body.where for body in head.bodies] == ["url", "url"]
    assert digests(head) == whole
    kept = set(await asyncio.to_thread(os.listdir, share / "default/models/run-1"))
    assert head.state
    assert head.state.sha256 in kept
    assert len(kept) <= 6  # of five versions the models, of one the state


async def lead_two_rounds(joined: Federation) -> None:
    """And vanish."""
    async with joined.workers():
        leader = asyncio.create_task(joined.aggregator(STREAM).run())
        await joined.closed(2)
        leader.cancel()
        await asyncio.wait([leader])


async def lose_the_state(joined: Federation) -> None:
    connection = await joined.broker.connect(AGGREGATOR, purpose="loss")
    await connection.delete(joined.topology.state("run-1"))
    await connection.close()


async def test_a_leader_that_finds_no_state_on_the_broker_takes_its_checkpoint_and_puts_it_back(
    whole: list[str], tmp_path: Path
) -> None:
    joined = federation(tmp_path / "run", inline_bytes=0)
    await lead_two_rounds(joined)
    await lose_the_state(joined)
    head = await joined.run(STREAM)
    assert digests(head) == whole
    assert head.state
    assert head.state.stream == joined.topology.state("run-1")


async def test_a_leader_without_state_hands_on_the_lead_and_names_the_remedy(tmp_path: Path) -> None:
    joined = federation(tmp_path / "run", inline_bytes=0)
    await lead_two_rounds(joined)
    await lose_the_state(joined)
    archive = await asyncio.to_thread(Archive, tmp_path / "another")
    with pytest.raises(ModelMissing, match=r"strategy's state \w+ is neither on the broker nor .* start one where"):
        await joined.aggregator(STREAM)._lead_once(archive)
    await archive.close()


@pytest.mark.xdist_group("rabbitmq")
async def test_over_rabbitmq_a_new_leader_goes_on_with_the_same_bits(
    rabbit: Rabbit, whole: list[str], tmp_path: Path
) -> None:
    sizes = Sizes(inline_bytes=0)
    joined = Federation(rabbit.broker(), tmp_path / "one", names(3), 600, 0.2, sizes, rabbit.topology())
    await lead_two_rounds(joined)
    joined.directory = tmp_path / "another"  # so state and model come from the broker
    assert digests(await joined.run(STREAM)) == whole


async def test_a_run_without_state_is_told_of_none(tmp_path: Path) -> None:
    head = await federation(tmp_path, inline_bytes=0).run(settings(3, 2, broker={"inline_bytes": 0}))
    assert head.state is None
    assert len(head.bodies) == 1


async def test_another_strategys_state_is_refused_and_one_without_drops_it(tmp_path: Path) -> None:
    await federation(tmp_path).run(first(INLINE, 2))
    momentum = settings(3, 4, strategy={"name": "fedavgm"})
    with pytest.raises(StateError, match=re.escape("the run had, or begin again with --fresh")):
        await federation(tmp_path).aggregator(momentum, from_checkpoint=True).run()
    yogi = settings(3, 3, strategy={"name": "fedyogi"})
    assert digests(await federation(tmp_path).run(yogi, from_checkpoint=True))  # it has the same moments
    plain = await federation(tmp_path).run(settings(3, 4), from_checkpoint=True)
    assert plain.state is None


async def test_with_fednova_an_update_that_tells_no_steps_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """`Pull` tells none. Nobody is left to wait for, so the run ends and says why."""
    with pytest.raises(ExceptionGroup) as failures:
        await federation(tmp_path).run(settings(3, 2, strategy={"name": "fednova"}))
    [failure] = failures.value.exceptions
    assert isinstance(failure, TaskError)
    assert re.search(r"fednova takes 1 to 10000: .*TrainResult\.effective_steps", str(failure))


async def test_the_next_run_deletes_the_state_of_the_one_before(tmp_path: Path) -> None:
    joined = federation(tmp_path / "one", inline_bytes=0)
    await joined.run(first(STREAM, 1))
    joined.directory = tmp_path / "two"
    await joined.run(settings(3, 1, run_id="run-2", broker={"inline_bytes": 0}, **ADAM))
    connection = await joined.broker.connect(AGGREGATOR, purpose="look")
    await (await connection.read(joined.topology.state("run-2"), offset="first")).close()
    with pytest.raises(TransportError, match="run-1"):
        await connection.read(joined.topology.state("run-1"), offset="first")
    await connection.close()
