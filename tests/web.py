"""A web server for tests: it serves a folder and takes PUT. `python -m tests.web FOLDER` prints its address."""

from __future__ import annotations

import asyncio
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from aiohttp import web


def web_server(folder: Path) -> AbstractContextManager[str]:
    """Its address, while it runs in a thread of its own."""
    return serving(application(folder))


@contextmanager
def serving(app: web.Application) -> Iterator[str]:
    """The address of any application, while it runs in a thread of its own."""
    loop, stop, ready = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    found: list[str] = []

    def tell(url: str) -> None:
        found.append(url)
        ready.set()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve(app, tell, stop)), name="web")
    thread.start()
    ready.wait(10)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def application(folder: Path) -> web.Application:
    app = web.Application(client_max_size=1 << 30)
    app.router.add_put("/{path:.+}", partial(_put, folder))
    app.router.add_static("/", folder)
    return app


async def serve(app: web.Application, tell: Callable[[str], None], stop: asyncio.Event) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    tell(f"http://127.0.0.1:{runner.addresses[0][1]}")
    await stop.wait()
    await runner.cleanup()


async def _put(folder: Path, request: web.Request) -> web.Response:
    body = await request.read()
    await asyncio.to_thread(_write, folder / request.match_info["path"], body)
    return web.Response(status=201)


def _write(path: Path, body: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    beside.write_bytes(body)
    beside.replace(path)


if __name__ == "__main__":
    asyncio.run(serve(application(Path(sys.argv[1])), partial(print, flush=True), asyncio.Event()))
