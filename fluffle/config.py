"""The whole configuration of one run. Every setting has one dotted name everywhere.

`round.deadline_s` is `deadline_s` in the TOML section `[round]`, the environment variable
`FLUFFLE_ROUND_DEADLINE_S`, the flag `--set round.deadline_s=30`, and for common settings a short flag.
Later layers win: defaults, the task's own, TOML file, environment, flags.
"""

from __future__ import annotations

import difflib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Self, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from aggregator.settings import (
    BrokerSettings,
    CodecSettings,
    EvaluationSettings,
    PersonalSettings,
    RoundSettings,
    RunSettings,
    StopSettings,
    StoreSettings,
    StrategySettings,
    check_together,
)
from broker.errors import ConfigError
from broker.messages import Federation, Part, RunId, Scalar, Text, Word
from fluffle.flags import FLAGS
from workers.attack import check_attack

PREFIX = "FLUFFLE_"
RUNS = "runs"
PARTITION = re.compile(r"iid|natural|(dirichlet|quantity):\d+(\.\d+)?(e-?\d+)?|shards:[1-9]\d{0,5}")
TARGET_METRIC = re.compile(r"[A-Za-z0-9_]+:[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _port_exists(listen: str) -> str:
    if int(listen.rpartition(":")[2] or 0) > 65535:
        raise ValueError("ports end at 65535")
    return listen


Listen = Annotated[
    str,
    StringConstraints(pattern=r"^(|[^:\s/]+:\d{1,5}|\[[0-9a-fA-F:.]+\]:\d{1,5})$"),
    AfterValidator(_port_exists),
]


def _attack_exists(attack: str) -> str:
    try:
        check_attack(attack)
    except ConfigError as unknown:
        raise ValueError(str(unknown)) from None
    return attack


AttackName = Annotated[str, AfterValidator(_attack_exists)]


class RunSection(Part):
    """Which run this is and where it is kept."""

    id: Annotated[
        RunId | Literal[""], Field(description="name of the run: a-z, 0-9 and '-'; empty: task, time and a token")
    ] = ""
    dir: Annotated[str, Field(description="where the run is kept; empty: runs/ and its id")] = ""
    initial: Annotated[
        str,
        Field(
            description="a .safetensors file with the initial model, or a folder of shards: of an aggregator "
            "without the task's code, or one that is trained further; empty: the task's own"
        ),
    ] = ""
    seed: Annotated[int, Field(ge=0, description="decides data split, initial model and training")] = 42


class DataSection(Part):
    """How a shipped task's data is divided among participants."""

    partition: Annotated[
        str,
        Field(
            description="`iid`, `dirichlet:ALPHA` (small: skewed labels), `quantity:ALPHA` (small: skewed sizes), "
            "`shards:K` (K label-sorted shards each), or `natural` (the data's own)"
        ),
    ] = "iid"
    imbalance: Annotated[
        float,
        Field(
            ge=1,
            description="thins the training data's classes to a long tail: the first has so many times as many "
            "examples as the last; 1: not",
        ),
    ] = 1.0

    @field_validator("partition")
    @classmethod
    def _known(cls, value: str) -> str:
        skewed = value.startswith(("dirichlet:", "quantity:"))
        if not PARTITION.fullmatch(value) or (skewed and not float(value.partition(":")[2])):
            raise ValueError(
                "use iid, natural, dirichlet:ALPHA or quantity:ALPHA (ALPHA above 0), or shards:K (K a whole "
                "number)"
            )
        return value


class BrokerSection(BrokerSettings):
    """Which broker, and the waits and sizes on the way through it."""

    url: Annotated[
        str,
        Field(
            description="`memory` (embedded) or amqp[s]://user:password@host:port/vhost; without a user it is the "
            "participant, or `aggregator`"
        ),
    ] = "memory"
    federation: Annotated[Federation, Field(description="name space on the broker")] = "default"
    secrets: Annotated[
        str,
        Field(description="a TOML file of passwords by user, for a URL without one (`fluffle broker definitions`)"),
    ] = ""
    amqp_heartbeat_s: Annotated[
        int,
        Field(
            ge=1,
            le=600,
            description="RabbitMQ gives up a connection, and its lead, that was silent for about twice this long",
        ),
    ] = 5

    @field_validator("url")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "memory" and not re.fullmatch(r"amqps?://[^\s/]+.*", value):
            raise ValueError("use memory, or a URL as amqp://user:password@host:5672/vhost")
        return value


class StoreSection(StoreSettings):
    """A claim-check store: large bodies lie there, and only references to them pass through the broker."""

    url: Annotated[
        str,
        Field(
            description="where this process reaches it: /FOLDER, s3://BUCKET/PREFIX, or http[s]://HOST/PATH for a "
            "worker; each may reach the same store under another address; empty: all goes through the broker"
        ),
    ] = ""

    @field_validator("url")
    @classmethod
    def _known(cls, value: str) -> str:
        if value and not re.fullmatch(r"(file://)?/[^\0]*|s3://[^\s/@]+(/\S*)?|https?://[^\s/@]+(/\S*)?", value):
            raise ValueError(
                "use a folder as /mnt/fluffle, s3://BUCKET/PREFIX or http[s]://HOST/PATH; credentials come from "
                "the environment or from fsspec's own configuration, never from here"
            )
        return value


class HttpSection(Part):
    """Where an aggregator tells its status: read-only, to whoever can reach that address."""

    listen: Annotated[
        Listen,
        Field(description="host:port of the aggregator's endpoint, as 127.0.0.1:8750; port 0: any; empty: none"),
    ] = "127.0.0.1:8750"


class ProcessSection(Part):
    """What the process of an aggregator or worker does about itself."""

    watchdog_s: Annotated[
        float,
        Field(
            ge=0,
            description="an event loop that does not answer for so long ends the process with exit code 70, and "
            "its supervisor starts it again; 0: never",
        ),
    ] = 120.0


class SimulationSection(Part):
    """How `fluffle simulate` plays the participants. Nobody else looks at it."""

    vectorise: Annotated[
        bool,
        Field(
            description="on the embedded broker, participants train side by side in one pass: quicker, and equal "
            "within rounding, but not bit for bit what they come to one by one or over RabbitMQ"
        ),
    ] = False
    virtual_time: Annotated[
        bool,
        Field(
            description="on the embedded broker, the clock jumps over waits: a training takes `simulation.delay`, "
            "all else takes no time"
        ),
    ] = False
    delay: Annotated[
        Text,
        Field(
            description="seconds of virtual time that a training takes: `constant:SECONDS`, `half-normal:SCALE`, "
            "`log-normal:MEDIAN,SIGMA` or `trace:FILE`; empty: `constant:1`"
        ),
    ] = ""
    delay_per: Annotated[
        Literal["task", "participant"],
        Field(description="a delay is drawn anew for each piece of work, or once: then some are always slow"),
    ] = "task"
    dropout: Annotated[
        float, Field(ge=0, lt=1, description="probability that a participant vanishes in the middle of its work")
    ] = 0.0
    back_after: Annotated[
        Text,
        Field(description="seconds until it is back, written as simulation.delay is; empty: `constant:60`"),
    ] = ""
    available: Annotated[
        Text,
        Field(
            description="when participants are there: `ON/PERIOD`, as 8h/24h, each with a phase of its own, or "
            "`trace:FILE`; empty: always"
        ),
    ] = ""
    mbit_s: Annotated[
        float,
        Field(
            ge=0,
            description="speed of each participant's link in Mbit/s: model and update add their bytes' time to the "
            "delay; 0: transfers take no time",
        ),
    ] = 0.0


class SiteSection(Part):
    """Where a worker works. The aggregator and simulations do not look at it."""

    participant: Annotated[
        str,
        Field(description="the participant that the worker serves; several share the process: p01,p07 or p01..p10"),
    ] = ""
    data: Annotated[
        str,
        Field(
            description="`share` of the task's data as data.partition says, `all` of it, a .csv or .npz file, or "
            "what the task's own `load` takes; empty: the share for a shipped task, all for another"
        ),
    ] = ""
    journal: Annotated[
        str,
        Field(
            description="directory of this worker alone, or with one for each of several; empty: "
            "journals/FEDERATION/PARTICIPANT"
        ),
    ] = ""
    threads: Annotated[
        int,
        Field(ge=0, description="torch's threads; with 1, equal seeds give equal bits everywhere; 0: all cores"),
    ] = 1
    lora_rank: Annotated[
        int,
        Field(
            ge=0,
            le=1 << 16,
            description="rank of this participant's LoRA adapters, at most the model's; the `model` of a "
            "TaskDefinition takes it as its argument; 0: the model's own",
        ),
    ] = 0
    device: Annotated[
        Annotated[str, StringConstraints(pattern=r"^(|auto|cpu|mps|cuda(:\d{1,3})?)$")],
        Field(
            description="where this participant trains and evaluates: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto`: "
            "the first there is of CUDA, MPS and CPU; empty: as the task says"
        ),
    ] = ""
    processes: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="processes that share each batch of a large model, each on a CUDA device of its own if it "
            "trains there",
        ),
    ] = 1
    attack: Annotated[
        AttackName,
        Field(description="what this worker sends instead of what it learned, as `study.attack`; for studies only"),
    ] = ""
    http: Annotated[
        Listen, Field(description="host:port of the worker's endpoint, as 127.0.0.1:8760; port 0: any; empty: none")
    ] = ""


class StudySection(Part):
    """What a simulation does to study a strategy."""

    attack: Annotated[
        AttackName,
        Field(
            description="what bad participants do: `label-flip`, or send: `sign-flip:SCALE`, `gaussian:SIGMA` or "
            "`little:Z`; empty: none"
        ),
    ] = ""
    attackers: Annotated[int, Field(ge=1, description="how many are bad, drawn by the seed")] = 1
    lora_ranks: Annotated[
        Text,
        Field(
            description="ranks of the participants' LoRA adapters, in turns: `4,8,16`; 0: the model's own; empty: "
            "that for all"
        ),
    ] = ""


class TrainSection(Part):
    """How participants train. A task may know further keys; what is not set here is the task's own choice."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Scalar]

    lr: Annotated[float | None, Field(gt=0, description="step size at the participants")] = None
    batch_size: Annotated[int | None, Field(ge=0, description="examples per step; 0: all of them")] = None
    local_epochs: Annotated[int | None, Field(ge=1, description="passes over the local data per round")] = None
    max_steps: Annotated[int | None, Field(ge=0, description="at most so many steps per round; 0: no limit")] = None
    momentum: Annotated[float | None, Field(ge=0, lt=1, description="momentum of the local optimiser")] = None
    l2: Annotated[float | None, Field(ge=0, description="weight of the L2 penalty")] = None
    mu: Annotated[
        float | None, Field(ge=0, description="weight of FedProx's proximal term; at most 1 / train.lr")
    ] = None
    optimiser: Annotated[
        Literal["sgd", "adamw"] | None,
        Field(description="the local optimiser; `adamw` goes on from round to round"),
    ] = None
    beta_1: Annotated[float | None, Field(ge=0, lt=1, description="of `adamw`; 0.9")] = None
    beta_2: Annotated[float | None, Field(ge=0, lt=1, description="of `adamw`; 0.999")] = None
    eps: Annotated[float | None, Field(gt=0, le=1, description="of `adamw`; 1e-8")] = None
    weight_decay: Annotated[float | None, Field(ge=0, description="of `adamw`; 0.01")] = None
    max_seconds: Annotated[
        float | None, Field(ge=0, description="train at most about so long per round; 0: no limit")
    ] = None
    warmup_rounds: Annotated[
        float | None, Field(ge=0, description="the step size rises from 0 over so many rounds")
    ] = None
    schedule: Annotated[
        Literal["constant", "linear", "cosine"] | None,
        Field(description="then it stays, or falls to 0 at train.schedule_rounds"),
    ] = None
    schedule_rounds: Annotated[float | None, Field(ge=0, description="the number of rounds of the schedule")] = None
    save_seconds: Annotated[
        float | None,
        Field(
            ge=0,
            description="how often a training saves its progress, from which a worker that was killed goes on; 60; "
            "0: never",
        ),
    ] = None
    class_weights: Annotated[
        str | None,
        Field(description="rare classes weigh more in the loss: `balanced` or `effective:BETA`; empty: all alike"),
    ] = None
    sampling: Annotated[
        str | None,
        Field(
            description="rare classes are seen more often: `over`, `under` or `balanced` (in each batch); empty: "
            "all examples alike"
        ),
    ] = None
    focal_gamma: Annotated[
        float | None, Field(ge=0, le=20, description="gamma of the focal loss, for what is hard; 0: plain")
    ] = None
    augment: Annotated[
        str | None,
        Field(description="changes images at each step, as `shift:2,rotate:10,noise:0.1,cutout:8`; empty: never"),
    ] = None
    mixup: Annotated[
        float | None, Field(ge=0, le=100, description="ALPHA of mixup: examples of a batch are mixed; 0: never")
    ] = None

    def chosen(self) -> dict[str, Scalar]:
        """The keys that are set."""
        return self.model_dump(exclude_none=True)


class Config(Part):
    """One run: what to learn, on which data, with whom, how, and until when."""

    task: Annotated[
        Word,
        Field(description="a shipped task or package.module:Object; a worker needs none for the shipped ones"),
    ] = ""
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    broker: BrokerSection = BrokerSection()
    store: StoreSection = StoreSection()
    http: HttpSection = HttpSection()
    process: ProcessSection = ProcessSection()
    round: RoundSettings = RoundSettings()
    stop: StopSettings = StopSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    strategy: StrategySettings = StrategySettings()
    personal: PersonalSettings = PersonalSettings()
    codec: CodecSettings = CodecSettings()
    train: TrainSection = TrainSection()
    simulation: SimulationSection = SimulationSection()
    site: SiteSection = SiteSection()
    study: StudySection = StudySection()

    @field_validator("stop")
    @classmethod
    def _readable_target(cls, stop: StopSettings) -> StopSettings:
        if stop.target_metric and not TARGET_METRIC.fullmatch(stop.target_metric):
            raise ValueError(
                f"stop.target_metric = {stop.target_metric!r}: write METRIC:VALUE, as accuracy:0.9 or rmse:55"
            )
        return stop

    @model_validator(mode="after")
    def _possible(self) -> Self:
        check_together(self.round, self.evaluation, self.strategy, self.codec, self.personal)
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir)

    def _sharing(self) -> dict[str, Scalar]:
        """How a shipped task's data is shared out, as workers are told."""
        told: dict[str, Scalar] = {"partition": self.data.partition, "participants": self.round.participants}
        return told if self.data.imbalance == 1 else {**told, "imbalance": self.data.imbalance}

    def run_settings(self) -> RunSettings:
        """What the aggregator needs to know of this."""
        return RunSettings(
            run_id=self.run.id,
            federation=self.broker.federation,
            seed=self.run.seed,
            learning_task=self.task,
            data=self._sharing(),
            train=self.train.chosen(),
            round=self.round,
            stop=self.stop,
            evaluation=self.evaluation,
            strategy=self.strategy,
            personal=self.personal,
            codec=self.codec,
            broker=BrokerSettings(**self.broker.model_dump(include=set(BrokerSettings.model_fields))),
            store=StoreSettings(**self.store.model_dump(include=set(StoreSettings.model_fields))),
        )


SECTIONS = frozenset(Config.model_fields) - {"task"}


class Given(NamedTuple):
    """A value, and where somebody wrote it."""

    value: Any
    origin: str


Layer = dict[str, Given]
Defaults = Callable[[str], Mapping[str, Scalar]]
BASE: Layer = {"round.participants": Given(10, "the default of a simulation")}


@dataclass(frozen=True, slots=True)
class Setting:
    """What there is to know about one setting."""

    name: str
    type: str
    default: Scalar | None
    description: str
    env: str
    flag: str

    @property
    def written(self) -> str:
        """The default as one would write it."""
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)

    @property
    def is_text(self) -> bool:
        return self.type not in ("int", "float", "bool")


@cache
def settings() -> tuple[Setting, ...]:
    """Every setting, in the order of the sections. Tasks may know further `train.*` keys."""
    return tuple(_setting(name, info) for name, info in _fields(Config))


def load_config(*layers: Layer, defaults: Defaults = lambda _: {}) -> Config:
    """One checked configuration from layers of which later ones win, with run id and directory filled in.

    `defaults` gives a task's own settings by dotted name; their `train.*` keys become known ones.
    Raises ConfigError.
    """
    asked = _merged(BASE, *layers)
    task = asked["task"].value if "task" in asked else ""
    if not isinstance(task, str) or not task:
        raise ConfigError("no task is named: give TASK, or `task` in the configuration (see `fluffle tasks`)")
    own = from_values(defaults(task), f"the task {task}")
    given = _merged(BASE, own, *layers)
    _check_names(given, known=[*_by_name(), *_train_keys(own)])
    return _placed(_validated(given))


def load_site(*layers: Layer) -> Config:
    """As `load_config`, for who runs nothing itself: no task need be named, and its settings need not be known."""
    given = _merged(BASE, *layers)
    _check_names(given, known=[*_by_name(), *_train_keys(given)])
    return _validated(given)


def taken_on_trust(*layers: Layer) -> Defaults:
    """Stands for a task's own settings where its code is not at hand: every `train.*` key is known."""
    given = _merged(*layers)
    return lambda _: {name: given[name].value for name in _train_keys(given)}


def from_values(values: Mapping[str, Scalar], origin: str = "this call") -> Layer:
    """A layer of settings by dotted name."""
    return {name: Given(value, origin) for name, value in values.items()}


def setting_named(name: str) -> Setting | None:
    return _by_name().get(name)


def near(word: str, known: Sequence[str]) -> str:
    """The end of an error message: which known name was probably meant."""
    by_key = {name.rpartition(".")[2]: name for name in reversed(known)}
    found = difflib.get_close_matches(word, known, 1, 0.7)
    found += [by_key[key] for key in difflib.get_close_matches(word.rpartition(".")[2], by_key, 1)]
    return f": did you mean {found[0]}?" if found else ": `fluffle settings` lists what there is"


def without_password(url: str) -> str:
    """The URL as it may be shown and kept."""
    return re.sub(r"(//[^:@/]*):[^@/]*@", r"\1@", url)


def _train_keys(layer: Layer) -> list[str]:
    return [name for name in layer if name.startswith("train.")]


def _merged(*layers: Layer) -> Layer:
    return {name: given for layer in layers for name, given in layer.items()}


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _fields(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def _setting(name: str, info: FieldInfo) -> Setting:
    return Setting(
        name=name,
        type=_type_name(info.annotation),
        default=None if info.is_required() else BASE.get(name, Given(info.default, "")).value,
        description=info.description or "",
        env=PREFIX + name.upper().replace(".", "_"),
        flag=next((flag.option for flag in FLAGS if flag.setting == name), ""),
    )


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _type_name(get_args(annotation)[0])
    return str(getattr(annotation, "__name__", annotation))


@cache
def _by_name() -> dict[str, Setting]:
    return {setting.name: setting for setting in settings()}


def _check_names(given: Layer, known: Sequence[str]) -> None:
    for name, (_, origin) in given.items():
        if name in SECTIONS:
            example = next(setting for setting in known if setting.startswith(f"{name}."))
            raise ConfigError(f"{origin}: {name} is a section: set one of its keys, as {example}")
        if name not in known:
            raise ConfigError(f"{origin}: unknown setting {name!r}{near(name, [*known, *SECTIONS])}")


def _validated(given: Layer) -> Config:
    nested: dict[str, Any] = {}
    for name, (value, _) in given.items():
        section, dot, key = name.partition(".")
        if dot:
            nested.setdefault(section, {})[key] = value
        else:
            nested[section] = value
    try:
        return Config(**nested)
    except ValidationError as error:
        raise ConfigError(_fault(error, given)) from None


def _fault(error: ValidationError, given: Layer) -> str:
    fault = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in fault["loc"][:2])
    message = fault["msg"].removeprefix("Value error, ")
    if name.startswith("train.") and not setting_named(name):
        message = "use a number, true, false or a text"
    if name not in given:  # a section as a whole: its message names the settings
        return message
    value, origin = given[name]
    setting = setting_named(name)
    shown = repr(without_password(value) if name == "broker.url" else value)
    meaning = f" ({setting.description})" if setting and fault["type"] != "value_error" else ""
    return f"{name} = {shown} ({origin}): {message[:1].lower()}{message[1:]}{meaning}"


def _placed(config: Config) -> Config:
    run_id = config.run.id or new_run_id(config.task, datetime.now(), secrets.token_hex(2))
    directory = config.run.dir or os.path.join(RUNS, run_id)
    return config.model_copy(update={"run": config.run.model_copy(update={"id": run_id, "dir": directory})})


def new_run_id(task: str, now: datetime, token: str) -> str:
    """A name that sorts by task and time and is valid on the broker."""
    suffix = f"-{now:%Y%m%d-%H%M%S}-{token}"
    return slug(task)[: 60 - len(suffix)].rstrip("-") + suffix


def slug(text: str) -> str:
    """The text as part of a name on the broker."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"
