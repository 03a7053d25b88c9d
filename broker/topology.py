"""Every name on the broker, and who may touch it. Names are made here and nowhere else.

For the federation `<f>` and the participant `<p>`:

fl.<f>.head        queue    head records, one consumer at a time
fl.<f>.up          exchange `<p>.<kind>`: what participants send
fl.<f>.chunks.<p>  exchange `<p>.chunk`: the way to one participant's outbox, which nobody else may write to
fl.<f>.updates     stream   everything small that participants send, and what operators want; the leader reads it
fl.<f>.outbox.<p>  stream   chunks of one participant's large updates
fl.<f>.model.<run> stream   chunks of global models
fl.<f>.state.<run> stream   chunks of a strategy's state
fl.<f>.down        exchange `all` or `<p>`: TrainRound; `operator`: Answer
fl.<f>.inbox.<p>   queue    the newest TrainRound
fl.<f>.rejected    queue    refused messages with the reason
fl.<f>.operator.<nonce> queue the answer to one command

And in a claim-check store, under its root:

<f>/models/<run>/<sha256>              a global model, or its strategy's state
<f>/updates/<p>/<run>/<task>/<sha256>  an update of one participant, who needs to write nowhere else
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from broker.errors import ConfigError
from broker.transport import Binding, Declaration, Exchange, Queue, Stream

PARTICIPANT = r"[a-z0-9-]{1,40}"
FEDERATION = r"[a-z0-9-]{1,40}"
AGGREGATOR = "aggregator"  # the user name that every aggregator connects with
EVERYONE = "all"
OPERATOR = "operator"
RESERVED = (AGGREGATOR, EVERYONE, OPERATOR)  # names that no participant may have
DEFAULT_EXCHANGE = r"amq\.default"  # how permissions name the exchange ""
MEBI = 1 << 20
LARGEST_SEGMENT_BYTES = 1 << 30  # RabbitMQ takes none above 3 GB
INBOX_EXPIRES_S = 14 * 24 * 3600.0
OPERATOR_EXPIRES_S = 60.0  # of whoever was interrupted while it waited for the answer
UP_KINDS = ("join", "heartbeat", "update", "failed", "leave")
CHUNK = "chunk"


@dataclass(frozen=True, slots=True)
class Access:
    """What one user may do, as regular expressions over whole names (AMQP permissions).

    `publish` and `bind` restrict the routing keys of topic exchanges further.
    """

    configure: str
    write: str
    read: str
    publish: dict[str, str]
    bind: dict[str, str]


@dataclass(frozen=True, slots=True)
class Topology:
    """The names of one federation."""

    federation: str

    def __post_init__(self) -> None:
        if not re.fullmatch(FEDERATION, self.federation):
            raise ConfigError(
                f"federation {self.federation!r} is not a valid name: use 1 to 40 of a-z, 0-9 and '-'"
            )

    def _name(self, *parts: str) -> str:
        return ".".join(("fl", self.federation, *parts))

    @property
    def head(self) -> str:
        return self._name("head")

    @property
    def up(self) -> str:
        return self._name("up")

    @property
    def down(self) -> str:
        return self._name("down")

    @property
    def updates(self) -> str:
        return self._name("updates")

    @property
    def rejected(self) -> str:
        return self._name("rejected")

    def model(self, run_id: str) -> str:
        return self._name("model", run_id)

    def state(self, run_id: str) -> str:
        return self._name("state", run_id)

    def chunks(self, participant: str) -> str:
        return self._name("chunks", participant)

    def outbox(self, participant: str) -> str:
        return self._name("outbox", participant)

    def model_place(self, *run_and_sha256: str) -> str:
        """Where all models are in a claim-check store, those of one run, or one model."""
        return "/".join((self.federation, "models", *run_and_sha256))

    def update_place(self, *participant_run_and_task: str) -> str:
        """Where all updates are in a claim-check store, those of one participant, of one run, or one task's."""
        return "/".join((self.federation, "updates", *participant_run_and_task))

    def check(self, token: str) -> str:
        """A name for something that is tried out and deleted again."""
        return self._name("check", token)

    def inbox(self, participant: str) -> str:
        if participant in RESERVED or not re.fullmatch(PARTICIPANT, participant):
            raise ConfigError(
                f"participant {participant!r} is not a valid name: use 1 to 40 of a-z, 0-9 and '-', "
                f"and none of {', '.join(RESERVED)}"
            )
        return self._name("inbox", participant)

    def operator_inbox(self, nonce: str) -> str:
        return self._name(OPERATOR, nonce)

    def aggregator_declarations(self) -> list[Declaration]:
        """What the aggregator needs before it can lead."""
        return [
            Exchange(self.up),
            Exchange(self.down),
            Queue(self.head, replicated=True, single_active_consumer=True, delivery_limit=1000),
            Queue(self.rejected, max_length=10_000),
            Stream(self.updates, max_bytes=1024 * MEBI, segment_bytes=64 * MEBI),
            *(Binding(self.up, f"*.{kind}", self.updates) for kind in UP_KINDS),
        ]

    def inbox_declarations(self, participant: str) -> list[Declaration]:
        """What a participant needs before it can be told anything."""
        inbox = self.inbox(participant)
        return [
            Queue(inbox, max_length=1, expires_s=INBOX_EXPIRES_S),
            Binding(self.down, EVERYONE, inbox),
            Binding(self.down, participant, inbox),
        ]

    def operator_declarations(self, nonce: str) -> list[Declaration]:
        """What an operator's command needs to be answered."""
        inbox = self.operator_inbox(nonce)
        return [Queue(inbox, expires_s=OPERATOR_EXPIRES_S), Binding(self.down, OPERATOR, inbox)]

    def outbox_declarations(self, participant: str, update_bytes: int) -> list[Declaration]:
        """A stream that keeps at least three updates: whole segments go, so it is sized for five.

        It has an exchange of its own. RabbitMQ checks which exchange a user writes to on every way there; the
        routing key only on the straight one, not for messages that come through another exchange or a CC header.
        """
        chunks, outbox = self.chunks(participant), self.outbox(participant)
        return [
            Exchange(chunks),
            _room_for(5, outbox, update_bytes),
            Binding(chunks, f"{participant}.{CHUNK}", outbox),
        ]

    def model_declarations(self, run_id: str, model_bytes: int) -> list[Stream]:
        """A stream that keeps at least four versions of the model."""
        return [_four_of(self.model(run_id), model_bytes)]

    def state_declarations(self, run_id: str, state_bytes: int) -> list[Stream]:
        """A stream that keeps a strategy's state of at least four versions."""
        return [_four_of(self.state(run_id), state_bytes)]

    def access(self, user: str) -> Access:
        """The rights of the aggregator (everything of this federation) or of one participant."""
        mine = re.escape(self._name()) + r"\."
        if user == AGGREGATOR:
            everything = f"{mine}.*"
            return Access(everything, f"({everything}|{DEFAULT_EXCHANGE})", everything, {}, {})
        inbox, chunks = re.escape(self.inbox(user)), re.escape(self.chunks(user))
        return Access(
            configure=inbox,
            write=f"({re.escape(self.up)}|{chunks}|{inbox})",
            read=f"({re.escape(self.down)}|{inbox}|{mine}(model|state)\\..*)",
            publish={self.up: f"{user}\\.[a-z]+"},
            bind={self.down: f"({EVERYONE}|{user})"},
        )


def _four_of(stream: str, size_bytes: int) -> Stream:
    return _room_for(6, stream, size_bytes)


def _room_for(many: int, stream: str, size_bytes: int) -> Stream:
    size_bytes = max(MEBI, size_bytes)
    return Stream(stream, max_bytes=many * size_bytes, segment_bytes=min(size_bytes, LARGEST_SEGMENT_BYTES))
