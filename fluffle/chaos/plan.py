"""Which faults strike, whom, when and for how long: drawn from a seed, before anything runs. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, get_args

Kind = Literal[
    "kill", "freeze", "freeze_long", "cut", "stall", "slow", "half_up", "half_down", "disk_full", "asleep",
    "wrong_clock",
    "broker_kill", "memory_alarm", "lost_tail", "repeat",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)

LEADER, STANDBY, BROKER = "leader", "standby", "broker"  # a role, not a process: leadership passes
HELD_ROUNDS = 3  # the last ones wait until all faults have struck
ROUNDS_PER_FAULT = 1.2  # faults overlap
QUORUM_ROUNDS_PER_FAULT = 2.0  # less: a quorum helps only while most are there
ROUNDS_MORE = 5
LONG_FREEZE_S = (30.0, 40.0)  # RabbitMQ gives up whoever is silent for two to three heartbeats of 10 s
SLOW_KB_PER_S = (4, 64)
CLOCK_OFF_S = (60.0, 7 * 86400.0)  # either way
REPEATS = (10, 40)
LOST_S = (0.5, 6.0)  # how much of a stream's end is lost
OF_BROKER: tuple[Kind, ...] = ("broker_kill", "memory_alarm", "lost_tail")  # those that need one of our own

ALL, UPDATES, MODEL, OUTBOX = "all", "updates", "model", "outbox."  # streams; a participant's name follows the last

# How often each kind strikes, and how many seconds it lasts.
WEIGHTS: dict[Kind, int] = {
    "kill": 30, "freeze": 12, "freeze_long": 2, "cut": 20, "stall": 10, "slow": 8, "half_up": 5, "half_down": 5,
    "disk_full": 5, "asleep": 10, "broker_kill": 4, "memory_alarm": 3,
    "lost_tail": 4, "wrong_clock": 6, "repeat": 6,
}  # fmt: skip
LASTS_S: dict[Kind, tuple[float, float]] = {
    "kill": (0.0, 2.0), "freeze": (0.5, 3.0), "freeze_long": LONG_FREEZE_S, "cut": (0.0, 0.0), "stall": (1.0, 6.0),
    "slow": (2.0, 6.0), "half_up": (0.0, 0.0), "half_down": (0.0, 0.0), "disk_full": (0.5, 3.0),
    "asleep": (6.0, 15.0), "broker_kill": (0.0, 3.0), "memory_alarm": (1.0, 4.0),
    "lost_tail": (0.0, 2.0), "wrong_clock": (3.0, 8.0),
    "repeat": (0.0, 0.0),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: it strikes `delay_s` after round `after_round` was closed, and is mended `lasts_s` later."""

    kind: Kind
    whom: str  # LEADER, STANDBY, BROKER or a participant
    after_round: int
    delay_s: float
    lasts_s: float
    kb_per_s: int = 0  # of a slow network
    clock_off_s: int = 0  # above 0: its clock is ahead
    repeats: int = 0  # messages
    stream: str = ""  # that loses its tail: ALL, UPDATES, MODEL or a participant's OUTBOX
    loses_s: float = 0.0  # how much of it


@dataclass(frozen=True, slots=True)
class Shape:
    """What is to be struck, and how often. `own_broker`: the broker may be killed. `large`: there are streams of
    chunks, too. `run_rounds` 0: as many as the faults need.
    """

    participants: tuple[str, ...]
    faults: int
    own_broker: bool = True
    quorum: bool = False
    large: bool = False
    run_rounds: int = 0

    @property
    def rounds(self) -> int:
        """Enough for all faults and some undisturbed rounds after them, unless it is said how many."""
        if self.run_rounds:
            return self.run_rounds
        per_fault = QUORUM_ROUNDS_PER_FAULT if self.quorum else ROUNDS_PER_FAULT
        return math.ceil(self.faults * per_fault) + ROUNDS_MORE

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Those that can strike. Who is asleep for rounds needs a quorum that goes on without it."""
        barred = {
            *(() if self.own_broker else OF_BROKER),
            *(() if self.quorum else ("asleep",)),
        }
        return tuple(kind for kind in KINDS if kind not in barred)


def draw(seed: int, shape: Shape) -> list[Fault]:
    """The faults in the order of their rounds. Every kind occurs if there are as many faults as kinds."""
    dice = Random(seed)  # noqa: S311 - a plan that can be repeated
    chosen = dice.sample(shape.kinds, min(shape.faults, len(shape.kinds)))
    more = shape.faults - len(chosen)
    chosen += dice.choices(shape.kinds, [WEIGHTS[kind] for kind in shape.kinds], k=more)
    dice.shuffle(chosen)
    last = shape.rounds - HELD_ROUNDS - 1
    rounds = sorted(dice.randint(1, last) for _ in chosen)
    return [_fault(dice, kind, after, shape) for kind, after in zip(chosen, rounds, strict=True)]


def _fault(dice: Random, kind: Kind, after_round: int, shape: Shape) -> Fault:
    return Fault(
        kind=kind,
        whom=_whom(dice, kind, shape.participants),
        after_round=after_round,
        delay_s=round(dice.uniform(0.0, 0.3), 3),
        lasts_s=round(dice.uniform(*LASTS_S[kind]), 3),
        **_details(dice, kind, shape),
    )


def _whom(dice: Random, kind: Kind, participants: Sequence[str]) -> str:
    if kind in (*OF_BROKER, "repeat"):
        return BROKER
    if kind == "asleep":
        return dice.choice(participants)
    if kind == "wrong_clock":
        return dice.choice((STANDBY, *participants))
    return dice.choice((LEADER, LEADER, STANDBY, *participants))  # the leader is what it is all about


def _details(dice: Random, kind: Kind, shape: Shape) -> dict[str, Any]:
    match kind:
        case "slow":
            return {"kb_per_s": dice.randint(*SLOW_KB_PER_S)}
        case "wrong_clock":
            return {"clock_off_s": round(_between(dice, CLOCK_OFF_S)) * dice.choice((-1, 1))}
        case "repeat":
            return {"repeats": dice.randint(*REPEATS)}
        case "lost_tail":
            chunks = (ALL, ALL, MODEL, f"{OUTBOX}{dice.choice(shape.participants)}") if shape.large else ()
            return {"stream": dice.choice((UPDATES, *chunks)), "loses_s": round(dice.uniform(*LOST_S), 3)}
        case _:
            return {}


def _between(dice: Random, limits: tuple[float, float]) -> float:
    """Minutes, hours and days are drawn equally often."""
    return math.exp(dice.uniform(math.log(limits[0]), math.log(limits[1])))
