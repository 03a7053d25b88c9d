"""What every test gets: a blocking call on the event loop fails it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from blockbuster import blockbuster_ctx


@pytest.fixture(autouse=True, scope="session")
def no_blocking_calls() -> Iterator[None]:
    with blockbuster_ctx():
        yield
