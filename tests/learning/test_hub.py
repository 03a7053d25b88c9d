"""A base model by its name on a hub: the real client, and a small hub on loopback that speaks its protocol."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs large models: pip install 'fluffle[llm]'")
pytest.importorskip("peft", reason="needs large models: pip install 'fluffle[llm]'")

from aiohttp import web

from tests.learning.test_large_models import saved
from tests.web import serving
from workers.hf.base import identity

COMMIT = "c0ffee" + "0" * 34
NAME = "somebody/small-bert"


async def _listed(names: list[str], request: web.Request) -> web.Response:
    """What `snapshot_download` asks first: which files a revision has."""
    if request.match_info["revision"] not in ("main", "v1", COMMIT):
        return web.json_response({"error": "no such revision"}, status=404)
    files = [{"rfilename": name} for name in names]
    return web.json_response({"id": NAME, "sha": COMMIT, "siblings": files})


async def _tree(names: list[str], request: web.Request) -> web.Response:
    assert request.match_info["revision"] == COMMIT
    return web.json_response([{"type": "file", "path": name, "size": 1, "oid": name} for name in names])


async def _file(asked: list[str], folder: Path, request: web.Request) -> web.StreamResponse:
    path = folder / request.match_info["file"]
    asked.append(f"{request.method} {path.name}")
    body = await asyncio.to_thread(path.read_bytes)
    headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
    return web.Response(body=body, headers=headers)


def hub(folder: Path, asked: list[str]) -> AbstractContextManager[str]:
    """Its address, while it has that one model."""
    app, names = web.Application(), [path.name for path in folder.iterdir()]
    app.router.add_get(f"/api/models/{NAME}/revision/{{revision}}", partial(_listed, names))
    app.router.add_get(f"/api/models/{NAME}/tree/{{revision}}", partial(_tree, names))
    app.router.add_get(f"/{NAME}/resolve/{{revision}}/{{file}}", partial(_file, asked, folder))
    return serving(app)


BIND = """
from tests.learning.test_large_models import classifier, reviews
print(classifier({base!r}, base={base!r}, revision={revision!r}).bind(reviews()).model.identity)
"""


def bound(base: str, revision: str, url: str, home: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own: the client reads where its hub is when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", BIND.format(base=base, revision=revision)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_it_is_fetched_once_and_is_the_same_base_as_the_folder(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "models")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody wants")
    asked: list[str] = []
    with hub(folder, asked) as url:
        first = bound(NAME, "v1", url, tmp_path / "cache")
        files = len(asked)
        again = bound(NAME, "v1", url, tmp_path / "cache")
    assert first.stdout.strip() == again.stdout.strip() == identity(folder), first.stderr
    assert len(asked) == files > 0  # the second time nothing is fetched
    assert not [line for line in asked if "pytorch_model" in line]


@pytest.mark.parametrize(("base", "revision"), [(NAME, "v2"), ("somebody/else", "v1")])
def test_what_the_hub_does_not_have_is_told(tmp_path: Path, base: str, revision: str) -> None:
    folder, _ = saved(tmp_path / "models")
    with hub(folder, []) as url:
        found = bound(base, revision, url, tmp_path / "cache")
    assert found.returncode
    assert f"base model '{base}' is no folder here, and the hub did not give it" in found.stderr
