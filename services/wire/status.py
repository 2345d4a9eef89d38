"""The table between the exception tree and gRPC status, read by both ends.

A status code alone cannot tell an error our server raised from one the transport made up
(UNAVAILABLE is both "etcd is away", said by a server, and "nobody listens there"). A server
therefore names the class in the trailing metadata; a status without that key is the transport's.
"""

from __future__ import annotations

import grpc

from services.runtime.errors import (
    Conflict,
    Exhausted,
    Invalid,
    NotFound,
    Retry,
    TesseraError,
    Unusable,
)

ERROR_KEY = "tessera-error"
TRACE_KEY = "traceparent"

# HTTP/2 headers carry the message; peers refuse header lists above 8 KiB, and UTF-8 bytes travel
# percent-encoded at three times their size.
MAX_DETAILS_BYTES = 2000

STATUS_OF: dict[type[TesseraError], grpc.StatusCode] = {
    Retry: grpc.StatusCode.UNAVAILABLE,
    Conflict: grpc.StatusCode.ABORTED,
    Invalid: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unusable: grpc.StatusCode.FAILED_PRECONDITION,
}

CLASS_NAMED: dict[str, type[TesseraError]] = {c.__name__.lower(): c for c in STATUS_OF}


def class_of(error: TesseraError) -> type[TesseraError]:
    """The class of the tree that `error` belongs to: itself, or the base it extends."""
    return next((c for c in STATUS_OF if isinstance(error, c)), Retry)


def details_of(error: TesseraError) -> str:
    text = str(error) or type(error).__name__
    if len(text.encode()) <= MAX_DETAILS_BYTES:
        return text
    return text.encode()[: MAX_DETAILS_BYTES - 1].decode(errors="ignore") + "…"
