"""What truly happened to every update: the stream says what was published, the histories what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from aggregator.checkpoints import Checkpoints
from broker.errors import BadMessage, StateError
from broker.head import Decision
from broker.messages import UpdateReady, Verdict
from broker.topology import AGGREGATOR, Topology
from broker.transport import Broker
from broker.wire import decode
from fluffle.chaos.streams import read_all

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True, slots=True)
class Balance:
    """Updates by their fate. `published` are those up to where the last record had read the stream.

    `after_the_end` arrived later: the run was over. `undecided`, `invented`, `contradicted` are offsets with no
    verdict, with a verdict but no update, with two verdicts; `counted_twice` are participant and task.
    """

    published: int
    after_the_end: int
    verdicts: Mapping[Verdict, int]
    undecided: tuple[int, ...] = ()
    invented: tuple[int, ...] = ()
    contradicted: tuple[int, ...] = ()
    counted_twice: tuple[tuple[str, int], ...] = ()

    @property
    def balanced(self) -> bool:
        wrong = (self.undecided, self.invented, self.contradicted, self.counted_twice)
        return not any(wrong) and self.published == sum(self.verdicts.values())


def balance(published: Sequence[int], decided: Sequence[Decision], end: int) -> Balance:
    """`published` are the offsets of all updates in the stream; the last record had read it up to `end`."""
    read = {offset for offset in published if offset < end}
    verdicts = Counter(decision.offset for decision in decided)
    counted = Counter((d.participant, d.task) for d in decided if d.verdict == "counted")
    fates = Counter(decision.verdict for decision in decided)
    return Balance(
        published=len(read),
        after_the_end=len(published) - len(read),
        verdicts={verdict: fates[verdict] for verdict in VERDICTS},
        undecided=tuple(sorted(read - set(verdicts))),
        invented=tuple(sorted(set(verdicts) - read)),
        contradicted=tuple(sorted(offset for offset, times in verdicts.items() if times > 1)),
        counted_twice=tuple(sorted(which for which, times in counted.items() if times > 1)),
    )


async def published(broker: Broker, topology: Topology, run_id: str) -> list[int]:
    """The offsets of all updates of that run, read from the broker itself."""
    connection = await broker.connect(AGGREGATOR, purpose="audit")
    try:
        found = await read_all(connection, topology.updates)
    finally:
        await connection.close()
    return [delivery.offset for delivery in found if _is_update(delivery.body, run_id)]


def _is_update(frame: bytes, run_id: str) -> bool:
    try:
        message, _ = decode(frame)
    except BadMessage:
        return False
    return isinstance(message, UpdateReady) and message.run_id == run_id


def read_to(run_dirs: Sequence[Path]) -> int:
    """The offset up to which the run's last record had read, as the run directories have it."""
    records = [Checkpoints(directory / "checkpoints").newest() for directory in run_dirs]
    newest = max((record for record in records if record), key=lambda record: record.rank, default=None)
    if newest is None or not newest.finished:
        raise StateError(
            f"{', '.join(map(str, run_dirs))}: no record of a finished run: the ledger cannot be balanced"
        )
    return newest.updates_from
