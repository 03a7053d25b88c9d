"""What operators do to a run: ask for its status, and write into the log what they want of it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from urllib.request import ProxyHandler, build_opener

from pydantic import ValidationError

from aggregator.status import LiveParticipant, RunStatus
from broker.errors import AccessRefused, ConfigError, ConnectionLost, StateError, TransportError
from broker.messages import Answer, Command, Control
from broker.retry import publish
from broker.topology import AGGREGATOR, Topology
from broker.transport import Broker, Inbox, Transport
from broker.wire import decode, encode
from fluffle.text import columns, metrics_text

DEFAULT_HTTP = "http://127.0.0.1:8750"
HTTP_S = 5.0
ANSWER_S = 30.0
MOST_STATUS_BYTES = 64 << 20


# -- commands: through the log -------------------------------------------------------------------------------


def wish(command: Command, participant: str = "", run_id: str = "") -> Control:
    """A Control of its own. Raises ConfigError if that is no participant's name."""
    if participant:
        Topology("default").inbox(participant)
    return Control(command=command, participant=participant, run_id=run_id, nonce=secrets.token_hex(8))


async def command(broker: Broker, topology: Topology, control: Control, patience_s: float = ANSWER_S) -> str:
    """Writes it into the log and returns what the leader answers. Raises StateError if it refuses or is silent."""
    transport = await broker.connect(AGGREGATOR, purpose="operator")
    try:
        try:
            answers = await _listen(transport, topology, control.nonce)
            await publish(transport, "", topology.updates, encode(control))
            answer = await _answer(answers, control.nonce, patience_s)
        finally:
            await transport.delete(topology.operator_inbox(control.nonce))
    finally:
        await transport.close()
    if answer is None:
        raise StateError(
            f"{control.command} was written to the log at the broker, but no aggregator answered within "
            f"{patience_s:g} s: is one running for federation {topology.federation!r}? One that goes on with this "
            "run will obey when it reads it"
        )
    if not answer.done:
        raise StateError(f"{control.command} was refused: {answer.text}")
    return answer.text


async def _listen(transport: Transport, topology: Topology, nonce: str) -> Inbox:
    with expected(topology):
        await transport.declare(*topology.operator_declarations(nonce))
    return await transport.consume(topology.operator_inbox(nonce))


@contextmanager
def expected(topology: Topology) -> Iterator[None]:
    """Around the first use of what a federation's aggregator declares. Raises StateError if it is not there."""
    try:
        yield
    except (ConnectionLost, AccessRefused):
        raise
    except TransportError as error:
        raise StateError(
            f"federation {topology.federation!r} is not set up on this broker ({error}): start its aggregator, or "
            "correct --federation"
        ) from error


async def _answer(answers: Inbox, nonce: str, patience_s: float) -> Answer | None:
    """The one with that nonce: answers to other operators reach this inbox too."""
    clock = asyncio.get_running_loop().time
    until = clock() + patience_s
    while (delivery := await answers.get(max(0.0, until - clock()))) is not None:
        await delivery.ack()
        message, _ = decode(delivery.body)
        if isinstance(message, Answer) and message.nonce == nonce and delivery.sender == AGGREGATOR:
            return message
    return None


# -- status: from the endpoint -------------------------------------------------------------------------------


def read_status(http: str = DEFAULT_HTTP) -> RunStatus:
    """What the aggregator at that address tells. Raises StateError if there is none, ConfigError for no address."""
    address = http if "://" in http else f"http://{http}"
    url = address.rstrip("/") + "/status"
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--http {http!r} is no address: write it as {DEFAULT_HTTP}")
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=HTTP_S) as response:
            return RunStatus.model_validate_json(response.read(MOST_STATUS_BYTES))
    except ValidationError as error:
        raise StateError(f"{url} does not answer like an aggregator of this version: correct --http") from error
    except (HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise StateError(
            f"{url} does not answer ({reason}): is an aggregator running there, with that http.listen? "
            "Name another address with --http URL"
        ) from error


def status_page(status: RunStatus) -> str:
    """All of `fluffle status`."""
    lines = [("aggregator", f"{status.role} {status.name}".rstrip()), ("federation", status.federation)]
    if status.role == "leader":
        lines += _run_lines(status)
    lines.append(("waits for", status.waits_for))
    people = f"\n{live_table(status)}" if status.role == "leader" else ""
    return columns(lines) + people


def _run_lines(status: RunStatus) -> list[tuple[str, str]]:
    attempt = f", attempt {status.attempt}" if status.attempt > 1 else ""
    doing = {"train": "training", "evaluate": "evaluation", "none": "closed"}[status.work] + attempt
    lines = [
        ("run", f"{status.run_id}, epoch {status.epoch}"),
        ("round", f"{status.round} of {status.rounds}: {doing}"),
        ("model", f"version {status.version}, {metrics_text(status.metrics) or 'not evaluated'}"),
    ]
    if status.best:
        lines.append(("best", f"version {status.best.version}: {status.best.value:.4g}"))
    if status.work != "none":
        lines.append(("updates", f"{len(status.accepted)} of {status.cohort} are in"))
    if status.wanted != "run":
        lines.append(("operator", {"pause": "wants a pause", "stop": "wants the run to stop"}[status.wanted]))
    if status.last_failure:
        lines.append(("last failure", status.last_failure))
    return lines


def live_table(status: RunStatus) -> str:
    """Who is live and what they said last; who was removed."""
    rows = [(p.name, f"{p.heard_s_ago:.0f} s ago", _doing(p)) for p in status.live]
    table = columns([("PARTICIPANT", "LAST HEARD", "PHASE"), *rows]) if rows else "no participant is live\n"
    removed = f"removed by the operator: {', '.join(status.removed)}\n" if status.removed else ""
    return table + removed


def _doing(participant: LiveParticipant) -> str:
    flood = f", {participant.ignored} messages above its quota ignored" if participant.ignored else ""
    return f"{participant.phase or 'not heard yet'}{flood}"
