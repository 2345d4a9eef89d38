"""Failures of etcd and of the way to it, in the words and classes of the one exception tree."""

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


class Unsent(Retry):
    """No server has acted on the request; even a write may be sent again."""


class Compacted(Conflict):
    """The revision asked for is no longer in etcd's history: list anew."""


class StaleToken(Retry):
    """The login has expired; refused before acting."""


# Refusals by etcd before it acts on a request (server/etcdserver/api/v3rpc, etcd 3.4 to 3.6), and
# gRPC's word for a connection that was never made.
_UNSENT = ("failed to connect", "etcdserver: no leader", "resolution failed", "not a leader")
_LOGIN = ("user name is empty", "authentication failed", "authentication is not enabled")
_STALE = ("auth token", "revision of auth store is old", "revision in header is old")


def translate(error: grpc.aio.AioRpcError, server: str) -> TesseraError:
    """`server` names the endpoint the call went to."""
    detail = (error.details() or "").removeprefix("etcdserver: ")
    at = f"etcd at {server}"
    if any(word in detail for word in _STALE):
        return StaleToken(f"{at} no longer accepts the login: {detail}")
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return _unavailable(error.details() or "", at)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return Retry(f"{at} did not answer in time; is it overloaded or stopped?")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return _exhausted(detail, at)
        case grpc.StatusCode.NOT_FOUND:
            return NotFound(f"{at}: {detail}")
        case grpc.StatusCode.OUT_OF_RANGE if "compacted" in detail:
            return Compacted(f"{at}: {detail}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return Unusable(
                f"{at} does not know the call: {detail}; is it an etcd of 3.4 or later?"
            )
        case code:
            return _refused(code, detail, at)


def _unavailable(detail: str, at: str) -> TesseraError:
    if "no leader" in detail:
        return Unsent(f"{at} has no leader; is a majority of its members up?")
    if any(word in detail for word in ("CERTIFICATE_VERIFY_FAILED", "SSL_ERROR", "handshake")):
        return Unsent(f"{at}: TLS handshake failed; check etcd.ca_file, cert_file and key_file")
    if any(word in detail for word in _UNSENT):
        return Unsent(f"{at} cannot be reached; is it running?")
    return Retry(f"{at} broke off: {detail}")


def _exhausted(detail: str, at: str) -> TesseraError:
    if "space" in detail:
        return Exhausted(
            f"{at} is out of space (quota); compact and defragment, or raise --quota-backend-bytes"
        )
    if "too many requests" in detail:
        return Retry(f"{at} is overloaded: {detail}")
    return Invalid(f"{at} refuses the request: {detail}")


def _refused(code: grpc.StatusCode, detail: str, at: str) -> TesseraError:
    if any(word in detail for word in _LOGIN):
        return Unusable(f"{at}: {detail}; check etcd.username and etcd.password")
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return Unusable(f"{at}: {detail}; grant the user or certificate a role on Tessera's keys")
    if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION):
        return Invalid(f"{at} refuses the request: {detail}")
    return Retry(f"{at} failed: {detail or code.name}")
