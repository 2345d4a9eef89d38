"""Spans and the W3C trace context that travels between processes and with stored policies.

Trace context is always kept and passed on. Spans leave the process only when an OTLP endpoint is
configured; the exporter is imported then, because it costs 36 MiB of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from opentelemetry import context, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

TRACEPARENT: Final = "traceparent"

_W3C: Final = TraceContextTextMapPropagator()


def configure(service: str, otlp_endpoint: str) -> TracerProvider:
    """Once per process, by process.run. `otlp_endpoint`: host:port or http(s)://host:port of an
    OTLP/gRPC collector, empty for none. The provider's `shutdown` flushes what is queued."""
    provider = TracerProvider(
        resource=Resource.create({"service.name": f"tessera-{service}"}),
        shutdown_on_exit=False,
    )
    if otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        insecure = not otlp_endpoint.startswith("https://")
        exporter = OTLPSpanExporter(endpoint=otlp_endpoint, insecure=insecure)
        provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider


@contextmanager
def span(
    name: str, traceparent: str | None = None, **attributes: str | int | float | bool
) -> Iterator[Span]:
    """A child of `traceparent` when given and well-formed, else of the current span."""
    parent = None if traceparent is None else _W3C.extract({TRACEPARENT: traceparent})
    tracer = trace.get_tracer("tessera")
    with tracer.start_as_current_span(name, context=parent, attributes=attributes) as current:
        yield current


def current_traceparent() -> str:
    """Of the current span; empty outside of one."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, context=context.get_current())
    return carrier.get(TRACEPARENT, "")
