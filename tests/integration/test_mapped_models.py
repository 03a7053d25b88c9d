"""Rounds whose large models and updates lie in mapped files: the same bits, whatever happens to the files."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from structlog.testing import capture_logs

from broker.head import HeadRecord
from broker.mapped import Draft
from broker.memory import MemoryBroker
from broker.tensors import Arrays, encode
from broker.topology import Topology
from tests.federation import Federation, Pull, names, settings
from workers.journal import FileJournal
from workers.task import TrainConfig, TrainResult
from workers.trainer import Sizes

STREAMS = {"inline_bytes": 0, "chunk_bytes": 1024}
SIZE = 3000


def federation(directory: Path) -> Federation:
    found = Federation(MemoryBroker(Topology("default").access), directory, names(3), size=SIZE)
    found.sizes = Sizes(**STREAMS)
    return found


async def run(here: Federation, rounds: int = 3, **broker: int) -> HeadRecord:
    return await here.run(settings(3, rounds=rounds, broker=broker))


def digest(head: HeadRecord) -> str:
    assert head.model
    return head.model.sha256


class Vandal(Pull):
    """Once it has the model of version 1, it writes over the leader's checkpoint of it, in place."""

    def __init__(self, name: str, checkpoints: Path) -> None:
        super().__init__(name, SIZE)
        self.checkpoints, self.struck = checkpoints, 0

    def train(self, arrays: Arrays, config: TrainConfig) -> TrainResult:
        if config.round == 2 and not self.struck:
            self.struck = 1
            path = self.checkpoints / f"{hashlib.sha256(encode(arrays)).hexdigest()}.safetensors"
            with path.open("r+b") as file:
                file.seek(-4, 2)
                file.write(b"\0\0\x80?")
        return super().train(arrays, config)


async def test_a_checkpoint_that_was_written_over_is_not_built_upon(tmp_path: Path) -> None:
    expected = digest(await run(federation(tmp_path / "undisturbed")))
    here = federation(tmp_path / "here")
    vandal = here.tasks["p01"] = Vandal("p01", tmp_path / "here" / "checkpoints")
    with capture_logs() as logs:
        head = await run(here, **STREAMS)
    assert vandal.struck
    assert digest(head) == expected
    reasons = [line["reason"] for line in logs if line["event"] == "term_ended"]
    assert len(reasons) == 1
    assert "the global model's file was damaged" in reasons[0]


def test_updates_that_workers_write_into_their_journals_have_the_same_bits(tmp_path: Path) -> None:
    expected = digest(asyncio.run(run(federation(tmp_path / "undisturbed"))))
    here = federation(tmp_path / "here")
    for name in here.participants:
        here.journals[name] = FileJournal(tmp_path / name)
    assert digest(asyncio.run(run(here, **STREAMS))) == expected
    for name in here.participants:
        found = asyncio.run(FileJournal(tmp_path / name).load())
        assert found.held is None, "its fate was told"
        assert (tmp_path / name / "update.safetensors").stat().st_size > 4 * SIZE
        assert [path.name for path in (tmp_path / name).glob("*.new")] == []


def test_versions_are_drafts_that_got_their_names(tmp_path: Path) -> None:
    """Nothing is copied: neither the initial model nor a version is written a second time."""
    here, named = federation(tmp_path), list[Path]()
    link = Draft.link

    def noted(draft: Draft, path: Path) -> bool:
        named.append(path)
        return link(draft, path)

    Draft.link = noted  # type: ignore[method-assign]
    try:
        asyncio.run(run(here, rounds=2, **STREAMS))
    finally:
        Draft.link = link  # type: ignore[method-assign]
    assert len(named) == 3
    assert {path.name.split(".")[0] for path in named} == {
        path.stem for path in (tmp_path / "checkpoints").glob("*.safetensors")
    }
