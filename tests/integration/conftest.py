"""Logs as the command writes them: plain text, so that a traceback needs no look at the disk."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog

from fluffle.logs import configure_logs


@pytest.fixture(autouse=True)
def logs() -> Iterator[None]:
    before = structlog.get_config()
    configure_logs("warning")
    yield
    structlog.configure(**before)
