"""What a run through faults came to, as plain data and in words."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from statistics import median
from typing import Any

from fluffle.chaos.audit import Balance
from fluffle.chaos.progress import Closing
from fluffle.chaos.scenario import Outcome, Scenario
from fluffle.chaos.strikes import Strike

DETAILS = ("kb_per_s", "clock_off_s", "repeats", "stream", "loses_s")  # of some kinds of fault
LIBRARIES = ("fluffle", "aio-pika", "aiormq", "numpy")


def recovery_s(strike: Strike, closings: Sequence[Closing]) -> float | None:
    """Seconds from the strike until the next round was closed; the fault's own duration is part of it."""
    return next((closing.at - strike.struck for closing in closings if closing.at > strike.struck), None)


def build_report(scenario: Scenario, outcome: Outcome) -> dict[str, Any]:
    """The object that `--json` writes. `passed` is what the exit code says."""
    recoveries = [seconds for s in outcome.strikes if (seconds := recovery_s(s, outcome.closings)) is not None]
    digests = {outcome.undisturbed_sha256, *outcome.models.values()}
    same = None if scenario.shape.quorum else len(digests) == 1
    one_model = len(set(outcome.models.values())) == 1
    return {
        "seed": scenario.seed,
        "passed": outcome.balance.balanced and one_model and same is not False and not _lost_itself(outcome),
        "participants": len(scenario.shape.participants),
        "rounds": outcome.closings[-1].round,
        "quorum": scenario.shape.quorum,
        "asynchronous": scenario.asynchronous,
        "large": scenario.shape.large,
        "coded": scenario.coded,
        "own_broker": scenario.broker is None,
        "faults": {"struck": len(outcome.strikes), **_by_kind(outcome.strikes)},
        "struck": [_line(s, recovery_s(s, outcome.closings), outcome.strikes[0].struck) for s in outcome.strikes],
        "ended_by_themselves": [{"process": name, "exit_code": code} for name, code in outcome.ended],
        "recovery_median_s": round(median(recoveries), 2) if recoveries else None,
        "recovery_max_s": round(max(recoveries), 2) if recoveries else None,
        "updates": _updates(outcome.balance),
        "balanced": outcome.balance.balanced,
        "model_sha256": outcome.models,
        "undisturbed_sha256": outcome.undisturbed_sha256,
        "same": same,
        "seconds": round(outcome.seconds, 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def report_text(report: dict[str, Any]) -> str:
    """The same in words, without the single faults."""
    faults = {kind: count for kind, count in report["faults"].items() if kind != "struck"}
    updates = {name: value for name, value in report["updates"].items() if isinstance(value, int)}
    updates["lost_by_broker"] = sum(report["updates"]["lost_by_broker"].values())
    same = {
        None: "not compared: which updates meet in a round depends on when they come",
        True: "the undisturbed run's",
        False: "DIFFERENT",
    }
    lines = [
        f"{report['faults']['struck']} faults in {report['rounds']} rounds and {report['seconds']:.0f} s: "
        f"{_words(faults)}",
        *([] if report["own_broker"] else ["the broker itself was not struck: it is not ours"]),
        f"recovery: median {report['recovery_median_s']} s, longest {report['recovery_max_s']} s",
        f"updates: {_words(updates)}: {'balanced' if report['balanced'] else 'NOT BALANCED'}",
        f"model: {same[report['same']]}",
        "nothing was lost, nothing was counted twice" if report["passed"] else "SOMETHING WENT WRONG",
    ]
    return "\n".join(lines) + "\n"


def _lost_itself(outcome: Outcome) -> bool:
    """Whether leaders say that the stream lost its tail, though nobody took it."""
    taken = any(strike.fault.kind == "lost_tail" for strike in outcome.strikes)
    return bool(sum(outcome.balance.lost_by_broker.values())) and not taken


def _by_kind(strikes: Sequence[Strike]) -> dict[str, int]:
    return dict(sorted(Counter(strike.fault.kind for strike in strikes).items()))


def _line(strike: Strike, recovered_s: float | None, since: float) -> dict[str, Any]:
    return {
        "kind": strike.fault.kind,
        "whom": strike.fault.whom,
        "process": strike.name,
        "after_round": strike.fault.after_round,
        "at_s": round(strike.struck - since, 2),
        "lasted_s": round(strike.mended - strike.struck, 2),
        "recovery_s": None if recovered_s is None else round(recovered_s, 2),
        **{name: value for name in DETAILS if (value := getattr(strike.fault, name))},
    }


def _updates(balance: Balance) -> dict[str, Any]:
    wrong = ("undecided", "invented", "contradicted", "counted_twice")
    return {
        "published": balance.published,
        **{str(verdict): count for verdict, count in balance.verdicts.items()},
        "after_the_end": balance.after_the_end,
        "lost_by_broker": {str(verdict): count for verdict, count in balance.lost_by_broker.items()},
        **{name: list(getattr(balance, name)) for name in wrong},
    }


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
