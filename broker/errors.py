"""Every error Fluffle raises on purpose. Each message names what is wrong, where, and the remedy.

FluffleError
├── ConfigError         a setting, flag or file that cannot work
├── DataError           a data set, shard or preprocessing step that cannot work
├── TaskError           a learning task that failed or returned nonsense
├── BadMessage          something that arrived was refused; `reason` goes to the ledger
│   └── ChunksMissing   a payload is not whole where it should be: it may be sent again
├── StateError          a run, checkpoint or journal that is missing, foreign or damaged
├── LeadershipLost      another aggregator leads now, or this one cannot be sure that it does
│   └── ModelMissing    this one has no copy of the global model; another may have one
└── TransportError
    ├── ConnectionLost  the connection is gone: connect again
    ├── PublishFailed   no confirm, or the broker refused the message; it may or may not have arrived
    ├── MessageTooLarge the broker takes no message of that size, now or later
    ├── Unroutable      nothing is bound to where the message was sent
    ├── QueueLost       the broker lists a queue or stream that it has lost: somebody must mend that
    ├── AccessRefused   the broker does not allow this user to do that
    └── StoreFailed     the claim-check store cannot be reached, or refuses
"""


class FluffleError(Exception):
    """Root of all errors that a caller may want to catch."""


class ConfigError(FluffleError):
    """A setting, flag or file that cannot work."""


class DataError(FluffleError):
    """A data set, shard or preprocessing step that cannot work."""


class TaskError(FluffleError):
    """A learning task that failed or returned nonsense."""


class BadMessage(FluffleError):
    """Something that arrived over the network was refused."""

    @property
    def reason(self) -> str:
        return str(self)


class ChunksMissing(BadMessage):
    """Pieces of a payload are not where they should be: they were lost there, or never sent."""


class StateError(FluffleError):
    """A run, checkpoint or journal that is missing, foreign or damaged."""


class LeadershipLost(FluffleError):
    """Another aggregator leads now, or this one cannot be sure that it still does."""


class ModelMissing(LeadershipLost):
    """The broker lost the global model and this aggregator never had it: another one may lead."""


class TransportError(FluffleError):
    """The broker or the way to it failed."""


class ConnectionLost(TransportError):
    """The connection is gone; whoever held it must connect again."""


class PublishFailed(TransportError):
    """No confirm in time, or the broker refused the message. It may or may not have arrived."""


class MessageTooLarge(TransportError):
    """The broker takes no message of that size. It did not arrive, and never will."""


class Unroutable(TransportError):
    """Nothing is bound to where the message was sent."""


class QueueLost(TransportError):
    """The broker lists a queue or stream but has lost it: it can be neither declared, used nor deleted."""


class AccessRefused(TransportError):
    """The broker does not allow this user to do that."""


class StoreFailed(TransportError):
    """The claim-check store cannot be reached, or refuses."""


def first_known(error: Exception) -> FluffleError | None:
    """The error itself, or what is at the bottom of a task group's failure; None if a part of it is a surprise."""
    if isinstance(error, ExceptionGroup):
        found = [first_known(part) for part in error.exceptions]
        return found[0] if all(found) else None
    return error if isinstance(error, FluffleError) else None
