"""Logging, configured once per process: events with fields, on stderr. stdout belongs to results."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog
from structlog.typing import Processor

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["text", "json"]


def configure_logs(level: Level = "info", format: Format = "text") -> None:  # noqa: A002 - the flag's word
    """Sends structlog's events to stderr, as `key=value` or as one JSON object a line."""
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _renderer(format),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=_stderr,
        cache_logger_on_first_use=False,  # a live display replaces sys.stderr while it runs
    )


def _renderer(format: Format) -> Processor:  # noqa: A002 - the flag's word
    if format == "json":
        return structlog.processors.JSONRenderer(default=str)
    return structlog.processors.LogfmtRenderer(
        key_order=["timestamp", "level", "event"], drop_missing=True, bool_as_flag=False
    )


def _stderr(*_: Any) -> structlog.PrintLogger:
    return structlog.PrintLogger(sys.stderr)
