"""The endpoint of aggregator and worker over real sockets, and how `fluffle status` reads it."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from aiohttp import ClientSession
from click.testing import CliRunner, Result
from pydantic import ValidationError
from structlog.testing import capture_logs

from aggregator import status
from aggregator.status import RunStatus
from broker.errors import ConfigError, StateError
from broker.memory import MemoryBroker
from broker.messages import Phase, Where
from broker.topology import Topology
from fluffle import participate
from fluffle.cli import cli
from fluffle.config import HttpSection, SiteSection
from fluffle.control import read_status
from fluffle.endpoint import Endpoint, serve, split_address
from fluffle.logs import configure_logs
from fluffle.serve import pages_of
from tests.federation import Federation, names, settings
from workers.status import WorkerStatus, waits_for
from workers.transfer import Transfer

Page = TypeVar("Page")
ROOT = Path(__file__).parents[2]
ANY = "127.0.0.1:0"
STANDBY = status.of_standby(settings(3), "42-ab")
CONNECTING = status.of_connecting(settings(3), "it does not answer")


async def listening(endpoint: Endpoint) -> str:
    await asyncio.wait_for(endpoint.listening.wait(), 10)
    host, port = endpoint.address
    return f"http://{host}:{port}"


async def get(url: str, method: str = "GET") -> tuple[int, str]:
    async with ClientSession() as session, session.request(method, url) as response:
        return response.status, await response.text()


async def test_it_tells_the_status_of_this_moment() -> None:
    told = [STANDBY]
    async with serve(ANY, pages_of(lambda: told[0])) as endpoint:
        url = await listening(endpoint)
        assert await asyncio.to_thread(read_status, url) == STANDBY
        told[0] = CONNECTING
        assert await asyncio.to_thread(read_status, url) == CONNECTING


@pytest.mark.parametrize(("seen", "code"), [(STANDBY, 200), (CONNECTING, 503)])
async def test_it_is_ready_while_it_is_connected_and_healthy_in_any_case(seen: RunStatus, code: int) -> None:
    async with serve(ANY, pages_of(lambda: seen)) as endpoint:
        url = await listening(endpoint)
        found, text = await get(f"{url}/readyz")
        assert found == code
        assert seen.waits_for in text
        assert (await get(f"{url}/healthz"))[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "PATCH"])
async def test_nothing_can_be_changed_through_it(method: str) -> None:
    async with serve(ANY, pages_of(lambda: STANDBY)) as endpoint:
        url = await listening(endpoint)
        assert [(await get(f"{url}{path}", method))[0] for path in ("/status", "/healthz", "/readyz")] == [405] * 3
        assert (await get(f"{url}/anything"))[0] == 404


async def test_a_second_one_waits_for_the_address_and_takes_it_once_it_is_free() -> None:
    configure_logs("info")
    with capture_logs() as logs:
        async with AsyncExitStack() as first:
            url = await listening(await first.enter_async_context(serve(ANY, pages_of(lambda: STANDBY))))
            same = url.removeprefix("http://")
            async with serve(same, pages_of(lambda: CONNECTING)) as second:
                await asyncio.sleep(0.3)
                assert not second.listening.is_set()
                assert await asyncio.to_thread(read_status, url) == STANDBY
                await first.aclose()
                assert await listening(second) == url
                assert await asyncio.to_thread(read_status, url) == CONNECTING
    events = [(entry["event"], entry["port"]) for entry in logs]
    port = int(url.rpartition(":")[2])
    assert events[0] == events[-1] == ("http_listening", port)
    assert set(events[1:-1]) == {("http_address_in_use", port)}


async def test_an_address_that_is_not_ours_never_fails_the_aggregator() -> None:
    with capture_logs() as logs:
        async with serve("192.0.2.1:8750", pages_of(lambda: STANDBY)) as endpoint:
            await asyncio.sleep(0.1)
            assert not endpoint.listening.is_set()
    assert {entry["event"] for entry in logs} == {"http_cannot_listen"}


async def test_without_an_address_there_is_no_endpoint() -> None:
    before = asyncio.all_tasks()
    async with serve("", pages_of(lambda: STANDBY)) as endpoint:
        assert asyncio.all_tasks() == before
        assert endpoint.address == ("", 0)


@pytest.mark.parametrize(
    ("listen", "address"),
    [("", ("", 0)), ("127.0.0.1:8750", ("127.0.0.1", 8750)), ("[::1]:0", ("::1", 0)), ("host:1", ("host", 1))],
)
def test_an_address_is_host_and_port(listen: str, address: tuple[str, int]) -> None:
    assert split_address(HttpSection(listen=listen).listen) == address


@pytest.mark.parametrize("listen", ["8750", ":8750", "host", "host:", "host:http", "http://host:1", "host:70000"])
def test_anything_else_is_refused(listen: str) -> None:
    with pytest.raises(ValidationError):
        HttpSection(listen=listen)
    with pytest.raises(ValidationError):
        SiteSection(http=listen)


# -- a worker's ------------------------------------------------------------------------------------------------


async def seen(ask: Callable[[], Awaitable[Page]], wanted: Callable[[Page], bool]) -> Page:
    """Asks until the page is as wanted; the test's own time-out ends it."""
    while True:
        if wanted(page := await ask()):
            return page
        await asyncio.sleep(0.05)


async def worker_status(url: str) -> WorkerStatus:
    return WorkerStatus.model_validate_json((await get(f"{url}/status"))[1])


async def test_a_worker_tells_what_it_does_and_what_it_waits_for(tmp_path: Path) -> None:
    broker = MemoryBroker(Topology("default").access)
    federation = Federation(broker, tmp_path, names(2))
    worker = federation.worker("p01")
    async with serve(ANY, participate.pages_of([worker])) as endpoint:
        url = await listening(endpoint)
        code, words = await get(f"{url}/readyz")
        assert (code, words) == (503, "idle: waits for the broker: it is being connected to\n")
        running = asyncio.create_task(worker.run())
        async with federation.crowd() as crowd:
            crowd.start("p02")
            head = await federation.aggregator(settings(2, rounds=3)).run()
        found = await seen(partial(worker_status, url), lambda now: now.settled == 3)
        assert (found.participant, found.federation, found.run_id) == ("p01", "default", head.run_id)
        assert (found.connected, found.phase, found.held) == (True, "idle", 0)
        assert (found.settled, found.fate, found.round) == (3, "counted", 3)
        assert found.phase_s < 60
        assert (await get(f"{url}/readyz"))[0] == 200
        broker.stop()
        _, words = await seen(partial(get, f"{url}/readyz"), lambda ready: ready[0] == 503)
        assert "waits for the broker: " in words
        assert "stopped" in (await worker_status(url)).waits_for
        assert (await get(f"{url}/healthz"))[0] == 200, "waiting for the broker is no illness"
        worker.stop()
        await running


@dataclass(frozen=True)
class Way:
    """To the broker."""

    trouble: str = ""
    blocked: str = ""
    transfer: Transfer | None = None


BODY = Where(where="stream", size_bytes=9_000_000, sha256="a" * 64, chunks=9, stream="outbox")
MOVING = Transfer("update", BODY, lambda: 10.0, lambda _: None, first=1, began=5.0, pieces=6)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ((Way("gone", "full"), "training", 3, 2), "the broker: gone"),
        ((Way("", "full"), "training", 3, 2), "the broker, which blocks publishers (full)"),
        ((Way("", "full", MOVING), "training", 3, 2), "the broker, which blocks publishers (full)"),
        ((Way(transfer=MOVING), "training", 3, 2), "the link: update, 6.0 of 9.0 MB at 1 MB/s, 3 s left"),
        ((Way(), "training", 3, 2), "nothing: it works on task 3 of round 2"),
        ((Way(), "holding", 3, 2), "the fate of its update of task 3"),
        ((Way(), "idle", 0, 2), "the aggregator, which has nothing for it to do"),
    ],
)
def test_a_worker_says_in_words_what_it_waits_for(said: tuple[Way, Phase, int, int], words: str) -> None:
    assert waits_for(*said) == words


# -- how it is read -------------------------------------------------------------------------------------------


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def test_who_finds_nobody_is_told_where_and_what_to_do(nobody: str) -> None:
    with pytest.raises(StateError, match=rf"http://{nobody}/status does not answer .* http.listen\? .* --http URL"):
        read_status(nobody)


def test_files_are_no_addresses() -> None:
    with pytest.raises(ConfigError, match="is no address"):
        read_status("file:///etc")


async def test_what_is_no_status_is_not_believed() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps({"role": "king"}).encode())
        await writer.drain()
        writer.close()

    stranger = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = stranger.sockets[0].getsockname()[1]
    async with stranger:
        with pytest.raises(StateError, match="does not answer like an aggregator"):
            await asyncio.to_thread(read_status, f"127.0.0.1:{port}")


async def invoked(*arguments: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, cli, arguments)


async def test_the_command_shows_it_in_words_and_as_json() -> None:
    async with serve(ANY, pages_of(lambda: STANDBY)) as endpoint:
        url = await listening(endpoint)
        words = await invoked("status", "--http", url)
        plain = await invoked("status", "--http", url, "--json", "-")
        people = await invoked("participants", "list", "--http", url)
    assert (words.exit_code, plain.exit_code, people.exit_code) == (0, 0, 0)
    assert "the leader's place: standing by" in words.stdout
    assert RunStatus.model_validate_json(plain.stdout) == STANDBY
    assert people.stdout == "no participant is live\n"


async def test_the_command_says_what_to_do_when_nobody_answers(nobody: str) -> None:
    found = await invoked("status", "--http", nobody)
    assert found.exit_code == 1
    assert f"http://{nobody}/status does not answer" in found.stderr


def test_the_command_needs_no_torch(nobody: str) -> None:
    program = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from fluffle.cli import cli\n"
        f"assert 'does not answer' in CliRunner().invoke(cli, ['status', '--http', '{nobody}']).stderr\n"
        "print(sorted({'torch', 'matplotlib', 'sklearn', 'aiohttp'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ran.stdout, ran.stderr) == ("[]\n", "")
