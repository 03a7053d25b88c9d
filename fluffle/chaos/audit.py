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
from broker.transport import Broker, Delivery
from broker.wire import decode
from fluffle.chaos.streams import read_all

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True, slots=True)
class Update:
    """What lies at an offset of the stream, read from the broker when all is over."""

    offset: int
    participant: str
    task: int


@dataclass(frozen=True, slots=True)
class Loss:
    """The leader of `epoch` found that the stream had lost its tail, and read all from `offset` on (again)."""

    epoch: int
    offset: int

    def concerns(self, decision: Decision) -> bool:
        """Whether that is about a message which may be gone, and was decided anew if it is not."""
        return decision.epoch < self.epoch and decision.offset >= self.offset


@dataclass(frozen=True, slots=True)
class Balance:
    """Updates by their fate. `published` are those up to where the last record had read the stream.

    `after_the_end` arrived later: the run was over. `lost_by_broker` are verdicts of epochs before the broker lost
    the tail of the stream, about what lay there; all others are `verdicts`. `undecided`, `invented`, `contradicted`
    are offsets with no verdict, with a verdict but no such update, with two verdicts; `counted_twice` are
    participant and task, whatever was lost.
    """

    published: int
    after_the_end: int
    verdicts: Mapping[Verdict, int]
    lost_by_broker: Mapping[Verdict, int]
    undecided: tuple[int, ...] = ()
    invented: tuple[int, ...] = ()
    contradicted: tuple[int, ...] = ()
    counted_twice: tuple[tuple[str, int], ...] = ()

    @property
    def balanced(self) -> bool:
        wrong = (self.undecided, self.invented, self.contradicted, self.counted_twice)
        return not any(wrong) and self.published == sum(self.verdicts.values())


def balance(
    published: Sequence[Update], decided: Sequence[Decision], end: int, losses: Sequence[Loss] = ()
) -> Balance:
    """`published` are all updates in the stream; the last record had read it up to `end`."""
    read = {update.offset: update for update in published if update.offset < end}
    lost = [decision for decision in decided if any(loss.concerns(decision) for loss in losses)]
    standing = [decision for decision in decided if decision not in lost]
    verdicts = Counter(decision.offset for decision in standing)
    counted = Counter((d.participant, d.task) for d in decided if d.verdict == "counted")
    return Balance(
        published=len(read),
        after_the_end=len(published) - len(read),
        verdicts=_fates(standing),
        lost_by_broker=_fates(lost),
        undecided=tuple(sorted(set(read) - set(verdicts))),
        invented=tuple(sorted({d.offset for d in standing if not _is_about(d, read.get(d.offset))})),
        contradicted=tuple(sorted(offset for offset, times in verdicts.items() if times > 1)),
        counted_twice=tuple(sorted(which for which, times in counted.items() if times > 1)),
    )


def _fates(decided: Sequence[Decision]) -> dict[Verdict, int]:
    fates = Counter(decision.verdict for decision in decided)
    return {verdict: fates[verdict] for verdict in VERDICTS}


def _is_about(decision: Decision, update: Update | None) -> bool:
    """What was refused before its task was known has task 0."""
    if update is None or update.participant != decision.participant:
        return False
    return decision.task == update.task or (decision.verdict == "refused" and decision.task == 0)


async def published(broker: Broker, topology: Topology, run_id: str) -> list[Update]:
    """All updates of that run, read from the broker itself."""
    connection = await broker.connect(AGGREGATOR, purpose="audit")
    try:
        found = await read_all(connection, topology.updates)
    finally:
        await connection.close()
    return [update for delivery in found if (update := _update(delivery, run_id))]


def _update(delivery: Delivery, run_id: str) -> Update | None:
    try:
        message, _ = decode(delivery.body)
    except BadMessage:
        return None
    if not isinstance(message, UpdateReady) or message.run_id != run_id:
        return None
    return Update(delivery.offset, message.participant, message.task)


def read_to(run_dirs: Sequence[Path]) -> int:
    """The offset up to which the run's last record had read, as the run directories have it."""
    records = [Checkpoints(directory / "checkpoints").newest() for directory in run_dirs]
    newest = max((record for record in records if record), key=lambda record: record.rank, default=None)
    if newest is None or not newest.finished:
        raise StateError(
            f"{', '.join(map(str, run_dirs))}: no record of a finished run: the ledger cannot be balanced"
        )
    return newest.updates_from
