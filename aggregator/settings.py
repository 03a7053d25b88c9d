"""What the aggregator can be told. One frozen object per concern; `fluffle/config.py` fills them."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from broker.codecs import LADDER, NONE, packing
from broker.codecs.difference import check_name
from broker.errors import ConfigError
from broker.messages import Federation, Part, RunId, Settings, Text, Word
from broker.payloads import MIN_CHUNK_BYTES, MIN_PART_BYTES

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]


class RoundSettings(Part):
    """When a round closes and who is asked. Zero means: whatever the line above it says."""

    participants: Annotated[
        int, Field(ge=1, description="how many are expected; the first round waits for them, at most one deadline")
    ] = 1
    cohort: Annotated[int, Field(ge=0, description="how many are asked each round; 0: everybody who is live")] = 0
    target: Annotated[int, Field(ge=0, description="a round closes at this many updates; 0: the whole cohort")] = 0
    quorum: Annotated[
        int, Field(ge=0, description="fewest updates to close with at the deadline; 0: the target")
    ] = 0
    deadline_s: Annotated[float, Field(gt=0, description="seconds until a round closes with the quorum")] = 60.0
    deadline: Annotated[
        Literal["fixed", "auto"],
        Field(
            description="`auto` learns from arrivals how long to wait: median + deadline_spreads times their "
            "spread; deadline_s holds until enough arrived"
        ),
    ] = "fixed"
    deadline_spreads: Annotated[
        float, Field(ge=0, description="more waits longer and loses fewer updates; for `deadline = auto`")
    ] = 4.0
    deadline_min_s: Annotated[float, Field(gt=0, description="no learned deadline is shorter")] = 1.0
    deadline_growth: Annotated[
        float, Field(ge=1, description="each further attempt gets a deadline this much longer")
    ] = 2.0
    deadline_max_s: Annotated[float, Field(gt=0, description="no deadline is longer")] = 3600.0
    policy: Annotated[
        Literal["synchronous", "buffered"],
        Field(
            description="a round asks a cohort for one update each, or (FedBuff) closes after every round.buffer "
            "updates, fresh or stale, and nobody waits"
        ),
    ] = "synchronous"
    buffer: Annotated[
        int, Field(ge=1, le=1 << 20, description="K of the buffered policy: updates from one version to the next")
    ] = 10
    concurrency: Annotated[
        int, Field(ge=0, description="how many work at a time under the buffered policy; 0: everybody who is live")
    ] = 0
    turns: Annotated[
        int,
        Field(
            ge=0,
            le=1 << 20,
            description="how many updates a participant may make from one version under the buffered policy; 0: "
            "half a buffer, or what fills it",
        ),
    ] = 0
    weights: Annotated[
        Literal["auto", "examples", "equal"],
        Field(description="what an update weighs; `auto`: its examples, or under the buffered policy all the same"),
    ] = "auto"
    late: Annotated[
        Literal["discard", "fold"],
        Field(description="a late update is discarded, or folded with weight 1/sqrt(1 + staleness)"),
    ] = "discard"
    staleness_max: Annotated[
        int, Field(ge=0, le=900, description="late or stale updates that are older never count")
    ] = 10
    max_examples: Annotated[int, Field(ge=1, le=1 << 30, description="no participant weighs more than this")] = (
        1 << 20
    )

    @property
    def most_asked(self) -> int:
        """How many a synchronous round asks at the most."""
        return self.cohort or 2 * self.participants

    @property
    def most_summed(self) -> int:
        """How many updates go into one version at the most; the room in its sum follows from it. Twice as many as
        are asked, for folded late ones add to a round's own."""
        return max(self.buffer, self.quorum) if self.is_buffered else 2 * self.most_asked

    @property
    def is_buffered(self) -> bool:
        return self.policy == "buffered"

    @property
    def takes_stale(self) -> bool:
        """Whether work on an older version can still be of use."""
        return self.is_buffered or self.late == "fold"

    @property
    def turns_allowed(self) -> int:
        """How many updates of one participant from one version: by default no majority, if others are there."""
        return self.turns or max(-(-self.buffer // self.participants), self.buffer // 2)

    @property
    def weight_max(self) -> int:
        """The most that one update weighs."""
        equal = self.weights == "equal" or (self.weights == "auto" and self.is_buffered)
        return 1 if equal else self.max_examples

    @model_validator(mode="after")
    def _fits_the_policy(self) -> Self:
        if not self.is_buffered:
            return self
        for name, value in (("target", self.target), ("cohort", self.cohort)):
            if value:
                raise ValueError(
                    f"round.{name} = {value} is for synchronous rounds: with round.policy = 'buffered' set "
                    f"round.{'buffer' if name == 'target' else 'concurrency'}"
                )
        if self.quorum > self.buffer:
            raise ValueError(
                f"round.quorum = {self.quorum} is above round.buffer = {self.buffer}: no round could close"
            )
        if self.turns * self.participants < self.buffer and self.turns:
            raise ValueError(
                f"round.turns = {self.turns} for round.participants = {self.participants} never fill "
                f"round.buffer = {self.buffer}: raise round.turns or lower round.buffer"
            )
        return self

    @model_validator(mode="after")
    def _possible(self) -> Self:
        wanted = (("round.quorum", self.quorum), ("round.target", self.target), ("round.cohort", self.cohort))
        for name, value in wanted:
            if value > self.participants:
                raise ValueError(
                    f"{name} = {value} is above round.participants = {self.participants}: "
                    "lower it or add participants"
                )
        for (low_name, low), (high_name, high) in pairwise(wanted):
            if low and high and low > high:
                raise ValueError(f"{low_name} = {low} is above {high_name} = {high}: no round could close")
        if self.quorum and self.cohort and self.quorum > self.cohort:
            raise ValueError(
                f"round.quorum = {self.quorum} is above round.cohort = {self.cohort}: no round could close"
            )
        return self


class StopSettings(Part):
    """When the run is finished: whichever comes first."""

    rounds: Annotated[int, Field(ge=1, description="after this many rounds")] = 20
    target_metric: Annotated[
        Word, Field(description="when a metric is reached, as `accuracy:0.9` or `rmse:55`")
    ] = ""
    patience: Annotated[
        int, Field(ge=0, description="after this many evaluations without a better one; 0: never")
    ] = 0
    max_seconds: Annotated[float, Field(ge=0, description="after this many seconds; 0: never")] = 0.0


class EvaluationSettings(Part):
    """How versions are measured."""

    mode: Annotated[
        Literal["central", "federated", "none"],
        Field(description="on the aggregator's held-out data, by the participants on theirs, or not at all"),
    ] = "central"
    every: Annotated[int, Field(ge=1, description="evaluate every n-th round, and the last")] = 1
    metric: Annotated[
        Word,
        Field(
            description="which metric judges versions, as `macro_f1`, or `accuracy_worst_10` with federated "
            "evaluation; empty: the task's own"
        ),
    ] = ""


class StrategySettings(Part):
    """How updates are combined."""

    name: Annotated[
        Word,
        Field(
            description="`fedavg`, `fedsgd`, `fedavgm`, `fedadagrad`, `fedadam`, `fedyogi`, `fednova`, `diloco`, "
            "`scaffold`, `q-fedavg`, `lora-stack` or `fedasync`; robust: `median`, `trimmed-mean`, `krum`, "
            "`multi-krum`, `bulyan`, `geometric-median` or `fltrust`"
        ),
    ] = "fedavg"
    server_lr: Annotated[
        float,
        Field(
            ge=0,
            description="step size at the aggregator; 0: the strategy's own (1; `fedadagrad` 0.1, `fedadam` "
            "and `fedyogi` 0.03; `diloco` 0.7; `fedasync` 0.6)",
        ),
    ] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1, description="of `fedavgm` and `diloco`")] = 0.9
    fragments: Annotated[
        int,
        Field(
            ge=1,
            le=1 << 20,
            description="Streaming DiLoCo: the model is cut into so many, and each round carries one of them; for "
            "`diloco`",
        ),
    ] = 1
    beta_1: Annotated[
        float, Field(ge=0, lt=1, description="how much of the mean change is remembered by the adaptive ones")
    ] = 0.9
    beta_2: Annotated[
        float, Field(ge=0, lt=1, description="how much of its square is remembered by `fedadam` and `fedyogi`")
    ] = 0.99
    tau: Annotated[float, Field(gt=0, description="how little the adaptive ones adapt; v begins as its square")] = (
        1e-3
    )
    steps_max: Annotated[
        float, Field(ge=1, le=1 << 30, description="`fednova` refuses updates that claim more effective steps")
    ] = 10_000.0
    buffers: Annotated[
        Text,
        Field(
            description="names of tensors that are averaged plainly, `*` stands for anything; by default a task's "
            "own buffers if its code is at hand"
        ),
    ] = "*running_mean,*running_var,*num_batches_tracked"
    q: Annotated[
        float,
        Field(ge=0, le=100, description="how much more a large loss counts with `q-fedavg`; 0: as any"),
    ] = 1.0
    lipschitz: Annotated[
        float, Field(ge=0, le=1e9, description="that of gradients, for `q-fedavg`; 0: 1 / train.lr")
    ] = 0.0
    root_examples: Annotated[
        int,
        Field(
            ge=1,
            le=1 << 30,
            description="how many held-out examples the aggregator trains on with `fltrust`, and not evaluates",
        ),
    ] = 100
    byzantine: Annotated[
        int, Field(ge=1, le=1 << 20, description="how many bad participants a robust strategy shall bear")
    ] = 1
    keep: Annotated[
        int,
        Field(
            ge=0, le=1 << 20, description="how many updates `multi-krum` averages; 0: all but strategy.byzantine"
        ),
    ] = 0
    clip_norm: Annotated[
        float,
        Field(ge=0, description="longer updates are shortened to this norm before any strategy; 0: never"),
    ] = 0.0

    @property
    def buffer_patterns(self) -> frozenset[str]:
        """What is in `buffers`, one by one."""
        return frozenset(name.strip() for name in self.buffers.split(",")) - {""}


class PersonalSettings(Part):
    """What stays with each participant and is its own."""

    local: Annotated[
        Text,
        Field(
            description="names of tensors that stay with each participant and never travel, `*` stands for "
            "anything: `*bn*` (FedBN), `head.*` (FedPer)"
        ),
    ] = ""
    ditto: Annotated[
        float,
        Field(
            ge=0,
            description="each participant also trains a model of its own, held to the global one with this weight "
            "(Ditto); at most 1 / train.lr; 0: none",
        ),
    ] = 0.0

    @property
    def patterns(self) -> tuple[str, ...]:
        """What is in `local`, one by one."""
        return tuple(sorted({name.strip() for name in self.local.split(",")} - {""}))


def names_in(codecs: str) -> tuple[str, ...]:
    """The codecs that a setting names."""
    return LADDER if codecs == "auto" else tuple(codecs.split(","))


class CodecSettings(Part):
    """How arrays are made smaller before they travel. Both sides always know `none`."""

    up: Annotated[
        Word,
        Field(
            description="how updates are encoded: `none`, `fp16`, `bf16`, `int8`, `qsgd:LEVELS`, `topk:RATIO`, "
            "`sign` or `powersgd:RANK`, each also with `+zstd`; of several (`none,fp16`) a worker takes the first "
            "whose update is sent in time; `auto`: of " + ",".join(LADDER)
        ),
    ] = NONE

    down: Annotated[
        Word,
        Field(
            description="a large model also travels as its difference to the version before, for who has that: "
            "`none`, `xor+zstd` (nothing is lost), or `fp16`, `bf16`, `int8`, each also with `+zstd`"
        ),
    ] = NONE

    @field_validator("down")
    @classmethod
    def _known_down(cls, value: str) -> str:
        try:
            check_name(value)
        except ConfigError as unknown:
            raise ValueError(str(unknown)) from None
        return value

    @field_validator("up")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            for name in names_in(value):
                packing(name)
        except ConfigError as unknown:
            raise ValueError(str(unknown)) from None
        return value

    @property
    def allowed(self) -> tuple[str, ...]:
        """The codecs that updates may use, the most faithful first; none is always allowed."""
        return () if self.up == NONE else names_in(self.up)


class BrokerSettings(Part):
    """Waits and sizes on the way to the broker and through it."""

    heartbeat_s: Annotated[float, Field(gt=0, description="seconds between a worker's heartbeats")] = 10.0
    liveness_s: Annotated[float, Field(gt=0, description="a participant unheard for longer is not asked")] = 60.0
    patience_s: Annotated[float, Field(gt=0, description="how long the broker may take to answer")] = 30.0
    inline_bytes: Annotated[int, Field(ge=0, le=1 << 22, description="larger payloads go in chunks")] = 256 << 10
    chunk_bytes: Annotated[int, Field(ge=MIN_CHUNK_BYTES, le=4 << 20, description="size of a chunk")] = 1 << 20
    quota_per_s: Annotated[
        float,
        Field(
            gt=0,
            description="messages that a participant may send beyond its answers, ten seconds' worth at once; "
            "64 KiB count as one; the rest is ignored, updates are refused",
        ),
    ] = 20.0
    refresh_s: Annotated[float, Field(gt=0, description="how often an idle leader republishes its record")] = 240.0


class StoreSettings(Part):
    """Parts of bodies in the claim-check store, and how long what nobody names stays there."""

    part_bytes: Annotated[int, Field(ge=MIN_PART_BYTES, le=64 << 20, description="size of a part")] = 8 << 20
    orphan_s: Annotated[
        float, Field(gt=0, description="what no record needs for so long is deleted, within twice that time")
    ] = 3600.0


def check_together(
    rounds: RoundSettings,
    evaluation: EvaluationSettings,
    strategy: StrategySettings,
    codec: CodecSettings,
    personal: PersonalSettings,
) -> None:
    """Raises ValueError for settings that are each possible, but not together."""
    if strategy.name == "fedasync":
        _check_fedasync(rounds, strategy, codec)
    if strategy.name == "lora-stack":
        _check_lora_stack(rounds, strategy, codec, personal)
    if strategy.fragments > 1:
        _check_fragments(rounds, strategy, codec)
    if not rounds.is_buffered:
        return
    if evaluation.mode == "federated":
        raise ValueError(
            "evaluation.mode = 'federated' makes everybody wait for the slowest, and round.policy = 'buffered' "
            "nobody: set evaluation.mode to central or none"
        )
    if personal.local or personal.ditto:
        raise ValueError(
            "personal.local and personal.ditto change what is a participant's own once its update is counted, and "
            "with round.policy = 'buffered' it goes on before that: use synchronous rounds"
        )
    if owing := [name for name in codec.allowed if packing(name).codec.feedback]:
        raise ValueError(
            f"codec.up = {owing[0]!r} has error feedback, which must know the fate of one update before the next "
            "begins; with round.policy = 'buffered' nobody waits for that: use none, fp16, bf16, int8 or qsgd"
        )


def _check_fragments(rounds: RoundSettings, strategy: StrategySettings, codec: CodecSettings) -> None:
    if strategy.name != "diloco":
        raise ValueError(f"strategy.fragments is for 'diloco', and strategy.name is {strategy.name!r}: set it to 1")
    if rounds.takes_stale:
        raise ValueError(
            "an update that is late holds another fragment than its round's, so strategy.fragments needs "
            "round.policy = 'synchronous' with round.late = 'discard'"
        )
    if strategy.clip_norm:
        raise ValueError(
            "strategy.clip_norm is for whole updates, and with strategy.fragments none is: set it to 0"
        )
    if owing := [name for name in codec.allowed if packing(name).codec.feedback]:
        raise ValueError(
            f"codec.up = {owing[0]!r} owes to the next update, which with strategy.fragments is of another "
            "fragment: use none, fp16, bf16, int8 or qsgd"
        )


def _check_lora_stack(
    rounds: RoundSettings, strategy: StrategySettings, codec: CodecSettings, personal: PersonalSettings
) -> None:
    _check_whole_models(strategy, codec)
    if rounds.late == "fold":
        raise ValueError(
            "round.late = 'fold' damps changes, but strategy.name = 'lora-stack' sends whole models: use discard"
        )
    if strategy.server_lr not in (0, 1):
        raise ValueError("strategy.server_lr is 1 with strategy.name = 'lora-stack': leave it out")
    if personal.local or personal.ditto:
        raise ValueError("personal.local and personal.ditto do not go with strategy.name = 'lora-stack' yet")


def _check_fedasync(rounds: RoundSettings, strategy: StrategySettings, codec: CodecSettings) -> None:
    if not rounds.is_buffered:
        raise ValueError("strategy.name = 'fedasync' needs round.policy = 'buffered', with round.buffer = 1")
    _check_whole_models(strategy, codec)


def _check_whole_models(strategy: StrategySettings, codec: CodecSettings) -> None:
    if strategy.clip_norm:
        raise ValueError(f"strategy.clip_norm shortens changes, but {strategy.name!r} sends whole models")
    if coarse := [name for name in codec.allowed if name.partition("+")[0] not in ("fp16", "bf16", NONE)]:
        raise ValueError(
            f"codec.up = {coarse[0]!r} is for changes, but strategy.name = {strategy.name!r} sends whole models: "
            "use none, fp16 or bf16"
        )


class RunSettings(Part):
    """One training run."""

    run_id: RunId
    federation: Federation = "default"
    seed: NonNegative = 42
    learning_task: Word = ""
    data: Settings = Field(default_factory=dict)
    train: Settings = Field(default_factory=dict)
    round: RoundSettings = RoundSettings()
    stop: StopSettings = StopSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    strategy: StrategySettings = StrategySettings()
    personal: PersonalSettings = PersonalSettings()
    codec: CodecSettings = CodecSettings()
    broker: BrokerSettings = BrokerSettings()
    store: StoreSettings = StoreSettings()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        check_together(self.round, self.evaluation, self.strategy, self.codec, self.personal)
        return self

    @property
    def combining(self) -> StrategySettings:
        """How updates are combined, with what follows from how participants train."""
        lr = self.train.get("lr", 0.0)
        if self.strategy.lipschitz or not isinstance(lr, int | float) or not lr:
            return self.strategy
        return self.strategy.model_copy(update={"lipschitz": 1 / lr})
