"""Logging: events with fields, as lines of JSON.

They go to stdout, since dockerd logs a plugin's stderr as errors.
"""

from __future__ import annotations

import logging
import sys
from typing import Final

import structlog

FIELD_LIMIT: Final = 8_000
"""Characters of one field. A line has few long ones, and dockerd splits lines over 64 KiB."""


def _bounded(
    logger: object, method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    for field, value in event.items():
        if isinstance(value, str) and len(value) > FIELD_LIMIT:
            event[field] = value[:FIELD_LIMIT] + "…"
    return event


def configure(level: str) -> None:
    """Set up logging for this process."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            _bounded,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(message)s", force=True)
