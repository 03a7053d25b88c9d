"""Where a process tells its status over HTTP: read-only, and never a reason for its work to fail.

Aggregators and workers have the same three pages. A second process on the same machine finds the address in use:
it says so, and tries again until it is free.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from broker.messages import Part
from broker.retry import Backoff

if TYPE_CHECKING:  # takes as long to import as all the rest of a worker
    from aiohttp import web

log = structlog.get_logger(__name__)

FAREWELL_S = 1.0  # for requests that are being answered when it ends


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a process has its broker, and in words what it does or misses."""

    ready: bool
    words: str


@dataclass(frozen=True, slots=True)
class Pages:
    """What is told: asked anew for each request, so neither may take long."""

    status: Callable[[], Part]
    health: Callable[[], Health]


@dataclass(slots=True)
class Endpoint:
    """`address` is host and port once `listening` is set."""

    address: tuple[str, int] = ("", 0)
    listening: asyncio.Event = field(default_factory=asyncio.Event)


def split_address(listen: str) -> tuple[str, int]:
    """Host and port of `host:port`; nothing to listen on is `("", 0)`."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port or 0)


@asynccontextmanager
async def serve(listen: str, pages: Pages) -> AsyncIterator[Endpoint]:
    """Answers at `listen` until the block ends, from the moment on that the address is free. "" serves nothing."""
    endpoint = Endpoint()
    if not listen:
        yield endpoint
        return
    from aiohttp import web

    runner = web.AppRunner(application(pages), access_log=None, shutdown_timeout=FAREWELL_S)
    await runner.setup()
    listening = asyncio.create_task(_listen(runner, split_address(listen), endpoint), name="http")
    try:
        yield endpoint
    finally:
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening
        await runner.cleanup()


def application(pages: Pages) -> web.Application:
    """The three pages; every other path or method is refused."""
    from aiohttp import web

    async def tell(_: web.Request) -> web.Response:
        return web.Response(text=pages.status().model_dump_json(), content_type="application/json")

    async def healthy(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def ready(_: web.Request) -> web.Response:
        health = pages.health()
        return web.Response(status=200 if health.ready else 503, text=f"{health.words}\n")

    app = web.Application()
    for path, handler in (("/status", tell), ("/healthz", healthy), ("/readyz", ready)):
        app.router.add_get(path, handler, allow_head=False)
    return app


async def _listen(runner: web.AppRunner, address: tuple[str, int], endpoint: Endpoint) -> None:
    backoff = Backoff(longest_s=10.0)
    while True:
        if await _bound(runner, *address):
            break
        await asyncio.sleep(backoff.next_s())
    host, port = runner.addresses[0][:2]
    endpoint.address = (host, port)
    endpoint.listening.set()
    log.info("http_listening", host=host, port=port)


async def _bound(runner: web.AppRunner, host: str, port: int) -> bool:
    from aiohttp import web

    site = web.TCPSite(runner, host, port)
    try:
        await site.start()
    except OSError as error:
        event = "http_address_in_use" if error.errno == errno.EADDRINUSE else "http_cannot_listen"
        log.warning(event, host=host, port=port, reason=error.strerror or str(error))
        await site.stop()
        return False
    return True
