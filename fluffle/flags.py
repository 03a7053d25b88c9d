"""The command line's short names for common settings. Kept apart so that `--help` imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Flag:
    """`option` is short for `--set setting=VALUE`; a switch has no metavar, and `--no-...` beside it."""

    option: str
    setting: str
    metavar: str
    help: str


RUN_DIR = Flag("--run-dir", "run.dir", "DIR", "Where everything of this run is kept.  [default: runs/RUN_ID]")
FEDERATION_FLAGS = (
    Flag("--broker", "broker.url", "URL", "`memory` (embedded) or amqp://user:password@host/vhost."),
    Flag("--strategy", "strategy.name", "NAME", "How updates are combined, as fedavg, fedadam, median or krum."),
    Flag("--quorum", "round.quorum", "Q", "Fewest updates that close a round at its deadline."),
    Flag("--target", "round.target", "T", "A round closes at this many updates."),
    Flag("--policy", "round.policy", "POLICY", "`synchronous`, or `buffered`: asynchronous, as FedBuff."),
    Flag("--buffer", "round.buffer", "K", "Under the buffered policy, updates from one version to the next."),
    Flag("--deadline-s", "round.deadline_s", "S", "Seconds until a round closes with the quorum."),
    Flag("--secrets", "broker.secrets", "FILE", "Passwords by user, for a broker's URL without one."),
    RUN_DIR,
)
COMMON_FLAGS = (
    Flag("--rounds", "stop.rounds", "R", "Stop after this many rounds."),
    Flag("--participants", "round.participants", "N", "How many participants share the data."),
    Flag("--partition", "data.partition", "HOW", "iid, dirichlet:ALPHA, shards:K or natural."),
    Flag("--seed", "run.seed", "N", "Makes data split, initial model and training repeatable."),
)
SIMULATION_FLAGS = (
    Flag("--virtual-time", "simulation.virtual_time", "", "The clock jumps over waits; trainings take --delay."),
    Flag(
        "--delay",
        "simulation.delay",
        "HOW",
        "Virtual seconds of a training: constant:S, half-normal:SCALE, log-normal:MEDIAN,SIGMA, trace:FILE.",
    ),
    Flag(
        "--dropout", "simulation.dropout", "P", "Probability that a participant vanishes in the middle of its work."
    ),
    Flag(
        "--available", "simulation.available", "ON/PERIOD", "When participants are there, as 8h/24h; or trace:FILE."
    ),
    Flag("--vectorise", "simulation.vectorise", "", "Train participants side by side; equal within rounding only."),
    Flag(
        "--attack", "study.attack", "HOW", "What bad participants send: sign-flip:SCALE, gaussian:SIGMA, little:Z."
    ),
    Flag("--attackers", "study.attackers", "N", "How many participants are bad, drawn by the seed."),
)
BROKER_FLAGS = tuple(flag for flag in FEDERATION_FLAGS if flag.setting in ("broker.url", "broker.secrets"))
AGGREGATOR_FLAGS = (
    *BROKER_FLAGS,
    Flag("--http", "http.listen", "HOST:PORT", "Where it tells its status; empty: nowhere."),
    RUN_DIR,
)
SITE_FLAGS = (
    Flag(
        "--participant", "site.participant", "NAME", "The participant that the worker serves, or several: p01..p10."
    ),
    *BROKER_FLAGS,
    Flag("--federation", "broker.federation", "NAME", "Name space on the broker."),
    Flag("--task", "task", "TASK", "The learning task here.  [default: the shipped one that the run names]"),
    Flag("--data", "site.data", "WHAT", "`share` of the task's data, `all` of it, or where it is."),
    Flag("--journal", "site.journal", "DIR", "Directory of this worker alone.  [default: journals/...]"),
    Flag("--http", "site.http", "HOST:PORT", "Where it tells its status.  [default: nowhere]"),
)
OPERATOR_FLAGS = tuple(
    flag for flag in SITE_FLAGS if flag.setting in ("broker.url", "broker.secrets", "broker.federation")
)
FLAGS = (*FEDERATION_FLAGS, *COMMON_FLAGS, *SIMULATION_FLAGS, *AGGREGATOR_FLAGS, *SITE_FLAGS)
