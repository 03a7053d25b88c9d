"""A web server for the tests: it serves a folder, and takes PUT."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from aiohttp import web


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Its URL, while it runs in a thread of its own."""
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    port: list[int] = []
    ready = threading.Event()

    app = web.Application(client_max_size=1 << 30)
    app.router.add_put("/{path:.+}", partial(_put, folder))
    app.router.add_static("/", folder)

    async def serve() -> None:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port.append(runner.addresses[0][1])
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), name="web")
    thread.start()
    ready.wait(10)
    try:
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


async def _put(folder: Path, request: web.Request) -> web.Response:
    body = await request.read()
    await asyncio.to_thread(_write, folder / request.match_info["path"], body)
    return web.Response(status=201)


def _write(path: Path, body: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    beside.write_bytes(body)
    beside.replace(path)
