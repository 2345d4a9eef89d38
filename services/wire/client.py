"""Dialling a service and calling it.

A caller sees the exception tree, never a gRPC status. No retries here: whoever calls knows what
a second attempt would mean.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TypeVar

import grpc
import grpc.aio

from services.runtime.errors import (
    Conflict,
    Exhausted,
    Invalid,
    NotFound,
    Retry,
    TesseraError,
    Unusable,
)
from services.runtime.tracing import current_traceparent
from services.wire.status import CLASS_NAMED, ERROR_KEY, TRACE_KEY
from services.wire.tls import ClientTls

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

KEEPALIVE_S = 10
KEEPALIVE_TIMEOUT_S = 5

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    # A call that comes while gRPC waits before its next attempt fails at once, and its caller then
    # waits in turn: with 5 s here, the last nodes were back a third later after an outage. Who
    # calls has a pause of its own, so this one is short.
    ("grpc.max_reconnect_backoff_ms", 500),
    # A proxy from the environment must not come between services of one cluster.
    ("grpc.enable_http_proxy", 0),
    # Subchannels shared across channels would share their back-off too.
    ("grpc.use_local_subchannel_pool", 1),
)

# What a status means that no handler of ours sent.
_TRANSPORT: dict[grpc.StatusCode, type[TesseraError]] = {
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.INVALID_ARGUMENT: Invalid,
    grpc.StatusCode.OUT_OF_RANGE: Invalid,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
    grpc.StatusCode.FAILED_PRECONDITION: Unusable,
    grpc.StatusCode.PERMISSION_DENIED: Unusable,
    grpc.StatusCode.UNAUTHENTICATED: Unusable,
}

_PROCESS_OF = {
    "tessera.identity": "identityd",
    "tessera.ipam": "ipamd",
    "tessera.policy": "policyd",
}


def channel(target: str, *, tls: ClientTls | None = None) -> grpc.aio.Channel:
    """`target`: "host:port" or "unix:///path". Connects when first used."""
    if tls is None:
        return grpc.aio.insecure_channel(target, options=_OPTIONS)
    options: tuple[tuple[str, int | str], ...] = _OPTIONS
    if tls.server_name:
        options = (*options, ("grpc.ssl_target_name_override", tls.server_name))
    return grpc.aio.secure_channel(target, tls.credentials(), options=options)


async def call(
    method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
    request: _Request,
    *,
    deadline_s: float,
) -> _Response:
    """One unary call. Raises a `TesseraError` that carries the server's own words."""
    try:
        return await method(request, timeout=deadline_s, metadata=trace_metadata())
    except grpc.aio.AioRpcError as error:
        target, service = _dialled(method)
        raise translate(error, target, service=service) from error


async def receive(
    method: grpc.aio.UnaryStreamMultiCallable[_Request, _Response], request: _Request
) -> AsyncGenerator[_Response, None]:
    """The messages of a stream, which may be endless; closing the generator ends the call. Raises a
    `TesseraError` that carries the server's own words."""
    stream = method(request, metadata=trace_metadata())
    try:
        async for message in stream:
            yield message
    except grpc.aio.AioRpcError as error:
        target, service = _dialled(method)
        raise translate(error, target, service=service) from error
    finally:
        stream.cancel()


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """For the `metadata` argument of a stream; `call` adds it by itself."""
    traceparent = current_traceparent()
    return ((TRACE_KEY, traceparent),) if traceparent else ()


def translate(
    error: grpc.aio.AioRpcError, target: str, *, service: str = "the service"
) -> TesseraError:
    """The exception a failed call or stream means. `service` and `target` name the other end."""
    code, details = error.code(), error.details() or ""
    trailing = error.trailing_metadata()
    named = trailing.get(ERROR_KEY) if trailing is not None else None
    if isinstance(named, str) and named in CLASS_NAMED:
        return CLASS_NAMED[named](details)
    where = f"{service} at {target}"
    if code is grpc.StatusCode.UNAVAILABLE:
        return Retry(f"{where} cannot be reached; is it running? ({details})")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Retry(f"{where} did not answer in time")
    if code is grpc.StatusCode.CANCELLED:
        return Retry(f"{where} closed the call")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Unusable(f"{where} does not know this method; do the versions match?")
    # INTERNAL, UNKNOWN, DATA_LOSS: a fault in the other process. It may be gone after a restart
    # there, and stopping here as well would help nobody.
    return _TRANSPORT.get(code, Retry)(f"{where} failed: {details or code.name}")


def _dialled(method: object) -> tuple[str, str]:
    """(target, process) of a stub's method. gRPC shows neither in public, an error must name both;
    tests/wire holds these two attributes."""
    path: bytes = getattr(method, "_method", b"")
    inner = getattr(method, "_channel", None)
    target = inner.target.decode() if inner is not None else "an unknown address"
    package = ".".join(path.decode().lstrip("/").split(".")[:2])
    return target.removeprefix("dns:///"), _PROCESS_OF.get(package, "the service")
