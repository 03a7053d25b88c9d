"""What this term has decided since the last committed record."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from broker.head import Decision, HeadRecord
from broker.messages import Fate, Metrics, UpdateReady, Verdict

MOST_LISTED = 1000  # refused and duplicate messages beyond are counted, no longer listed: a flood stays small
MOST_METRICS = 24  # names: twice that, and what `fairness.py` adds, is what a record may hold
LONGEST_NAME = 64


class Ledger:
    """Begins as the record says and grows with every decision; the next record takes it over whole."""

    def __init__(self, head: HeadRecord) -> None:
        self.settled: dict[str, tuple[int, Fate]] = dict(head.settled)
        self._epoch = head.epoch
        trains = head.open is not None and head.open.work == "train"
        self._next_version = head.version + 1 if trains else 0
        self.decided: list[Decision] = []
        self.metrics: dict[str, tuple[int, Metrics]] = {}
        self.useless = 0  # refused and duplicate messages

    @property
    def unlisted(self) -> int:
        """How many refused and duplicate messages `decided` does not list."""
        return max(0, self.useless - MOST_LISTED)

    def counted(self, update: UpdateReady, offset: int, weight: int, staleness: int) -> None:
        """Accepted into the open round."""
        self.settled[update.participant] = (update.task, "counted")
        self.metrics[update.participant] = (weight, update.metrics)
        self._list("counted", update.participant, update.task, offset, weight=weight, staleness=staleness)

    def late(self, update: UpdateReady, offset: int, weight: int, staleness: int, reason: str) -> None:
        """An answer to a closed task; with a weight it was summed all the same."""
        self.settled[update.participant] = (update.task, "counted" if weight else "late")
        self._list(
            "late", update.participant, update.task, offset, weight=weight, staleness=staleness, reason=reason
        )

    def give_up(self, reason: str) -> None:
        """The open round will never close: what was summed in it goes into no version."""
        self.settled |= {d.participant: (d.task, "late") for d in self.decided if d.weight}
        late = {"verdict": "late", "weight": 0, "version": 0, "reason": reason[:200]}
        self.decided = [d.model_copy(update=late) if d.weight else d for d in self.decided]

    def duplicate(self, update: UpdateReady, offset: int, reason: str) -> None:
        self._list("duplicate", update.participant, update.task, offset, reason=reason)

    def refused(self, participant: str, task: int, offset: int, reason: str, *, settles: bool) -> None:
        """Not counted; if it answered the open task that is `settled`, though the same task may be tried again."""
        last_task, _ = self.settled.get(participant, (0, "refused"))
        if settles and task > last_task:
            self.settled[participant] = (task, "refused")
        self._list("refused", participant, task, offset, reason=reason)

    def _list(
        self,
        verdict: Verdict,
        participant: str,
        task: int,
        offset: int,
        *,
        weight: int = 0,
        staleness: int = 0,
        reason: str = "",
    ) -> None:
        if verdict in ("refused", "duplicate"):
            self.useless += 1
            if self.unlisted:
                return
        self.decided.append(
            Decision(
                epoch=self._epoch, offset=offset, participant=participant, task=task, verdict=verdict,
                weight=weight, version=self._next_version if weight else 0, staleness=staleness,
                reason=reason[:200],
            )
        )  # fmt: skip


def weighted_means(reports: Mapping[str, tuple[int, Metrics]], prefix: str) -> Metrics:
    """Means of each metric over those who reported it, by weight; the same in whatever order they came.

    The names that most participants report: one who invents many shall not fill the record.
    """
    reporters = Counter(name for _, metrics in reports.values() for name in metrics)
    means = {}
    for name in sorted(reporters, key=lambda name: (-reporters[name], name))[:MOST_METRICS]:
        told = [(weight, metrics[name]) for weight, metrics in reports.values() if name in metrics]
        total = sum(weight for weight, _ in told)
        means[(prefix + name)[:LONGEST_NAME]] = math.fsum(weight / total * value for weight, value in told)
    return means
