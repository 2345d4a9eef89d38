"""Logging: structlog events through the standard library to stderr.

An event is a constant, dotted name (`identity.claimed`) and its data are keys (keys.py). One line
per state change, none per packet, request or poll. Libraries that log through `logging` come out
in the same form. `configure` is called once, by process.run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import TextIO

import structlog
from opentelemetry import trace
from structlog.typing import Processor

from services.runtime.errors import Invalid

LEVELS = ("debug", "info", "warning", "error")

Logger = structlog.stdlib.BoundLogger


def logger(name: str) -> Logger:
    """One per module, at its head, with the module's name."""
    bound: Logger = structlog.stdlib.get_logger(name)
    return bound


def configure(level: str, *, json: bool, stream: TextIO | None = None) -> None:
    if level not in LEVELS:
        raise Invalid(f"log level {level!r} is none of {', '.join(LEVELS)}; set log.level")
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_trace,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderer(json=json, tty=handler.stream.isatty()),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # A line per request of our own listeners is a line per poll.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


def _renderer(*, json: bool, tty: bool) -> list[Processor]:
    if json:
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    # Plain tracebacks: the pretty ones print local variables, secrets among them.
    plain = structlog.dev.plain_traceback
    return [structlog.dev.ConsoleRenderer(colors=tty, sort_keys=False, exception_formatter=plain)]


def _add_trace(
    _logger: object, _method: str, event: MutableMapping[str, object]
) -> MutableMapping[str, object]:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
    return event
