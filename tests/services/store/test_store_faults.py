"""etcd's failures, as its releases word them, in the one exception tree."""

from __future__ import annotations

import grpc
import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata

from services.runtime.errors import Exhausted, Invalid, NotFound, Retry, TesseraError, Unusable
from services.store.faults import Compacted, StaleToken, Unsent, translate


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        (StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: refused", Unsent),
        (StatusCode.UNAVAILABLE, "etcdserver: no leader", Unsent),
        (StatusCode.UNAVAILABLE, "etcdserver: request timed out", Retry),
        (StatusCode.UNAVAILABLE, "Socket closed", Retry),
        (StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", Retry),
        (StatusCode.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", Exhausted),
        (StatusCode.RESOURCE_EXHAUSTED, "etcdserver: too many requests", Retry),
        (StatusCode.RESOURCE_EXHAUSTED, "grpc: received message larger than max", Invalid),
        (StatusCode.NOT_FOUND, "etcdserver: requested lease not found", NotFound),
        (
            StatusCode.OUT_OF_RANGE,
            "etcdserver: mvcc: required revision has been compacted",
            Compacted,
        ),
        (
            StatusCode.OUT_OF_RANGE,
            "etcdserver: mvcc: required revision is a future revision",
            Retry,
        ),
        (StatusCode.INVALID_ARGUMENT, "etcdserver: request is too large", Invalid),
        (StatusCode.INVALID_ARGUMENT, "etcdserver: user name is empty", Unusable),
        (
            StatusCode.INVALID_ARGUMENT,
            "etcdserver: authentication failed, invalid user ID or password",
            Unusable,
        ),
        (StatusCode.INVALID_ARGUMENT, "etcdserver: revision of auth store is old", StaleToken),
        (StatusCode.UNAUTHENTICATED, "etcdserver: invalid auth token", StaleToken),
        (StatusCode.PERMISSION_DENIED, "etcdserver: permission denied", Unusable),
        (StatusCode.FAILED_PRECONDITION, "etcdserver: authentication is not enabled", Unusable),
        (StatusCode.UNIMPLEMENTED, "unknown service etcdserverpb.KV", Unusable),
        (StatusCode.UNKNOWN, "", Retry),
    ],
)
def test_a_failure_of_etcd_is_of_the_class_its_caller_needs(
    code: grpc.StatusCode, details: str, kind: type[TesseraError]
) -> None:
    failure = translate(AioRpcError(code, Metadata(), Metadata(), details), "etcd-1:2379")
    assert type(failure) is kind
    assert "etcd at etcd-1:2379" in str(failure)
    assert "\n" not in str(failure)


def test_an_unknown_outcome_is_not_taken_for_unsent() -> None:
    error = AioRpcError(StatusCode.UNAVAILABLE, Metadata(), Metadata(), "Connection reset by peer")
    assert not isinstance(translate(error, "e"), Unsent)
