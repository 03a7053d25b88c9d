"""What every test gets: shipped data only, and an event loop on which a blocking call fails the test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from blockbuster import blockbuster_ctx


@pytest.fixture(autouse=True, scope="session")
def no_blocking_calls() -> Iterator[None]:
    with blockbuster_ctx():
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
