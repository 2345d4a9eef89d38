"""policyd, asked on behalf of REST."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import grpc.aio
from tessera_wire.policy.v1 import policy_pb2, policy_pb2_grpc

from services.apid.backends import RPC_DEADLINE_S
from services.apid.policies import model
from services.apid.rest.errors import PRECONDITION_FAILED, Refusal
from services.runtime.errors import Conflict
from services.wire.client import call, trace_metadata, translate

# Parsing and writing as many policies as one request can hold.
APPLY_DEADLINE_S: Final = 60.0


class Policies:
    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub = policy_pb2_grpc.PolicyAdminStub(to)

    async def apply(self, request: policy_pb2.ApplyRequest) -> model.Applied:
        """Raises PRECONDITION_FAILED where a policy is not as `expected`."""
        with _guarded(request.expected):
            answer = await call(self._stub.Apply, request, deadline_s=APPLY_DEADLINE_S)
        return model.Applied(
            answer.revision, _applied(answer.policies), tuple(map(problem_of, answer.problems))
        )

    async def delete(
        self, refs: Iterable[model.Ref], author: str, expected: Iterable[int] = ()
    ) -> model.Deleted:
        """Raises PRECONDITION_FAILED where a policy has none of the `expected` revisions."""
        request = policy_pb2.DeleteRequest(
            refs=map(_ref_to_wire, refs),
            author=author,
            expected=expected,
        )
        with _guarded(request.expected):
            answer = await call(self._stub.Delete, request, deadline_s=RPC_DEADLINE_S)
        return model.Deleted(
            answer.revision, _applied(answer.policies), tuple(map(ref_of, answer.not_found))
        )

    async def list(
        self, kind: str, namespace: str, name: str
    ) -> tuple[tuple[model.StoredPolicy, ...], int]:
        """Policies, and the revision they are of."""
        request = policy_pb2.ListRequest(kind=kind, namespace=namespace, name=name)
        answer = await call(self._stub.List, request, deadline_s=RPC_DEADLINE_S)
        return tuple(map(_stored, answer.policies)), answer.revision

    async def status(self, ref: model.Ref) -> model.PolicyStatus:
        request = _ref_to_wire(ref)
        return _status(await call(self._stub.PolicyStatus, request, deadline_s=RPC_DEADLINE_S))

    async def watch_status(self, ref: model.Ref) -> AsyncGenerator[model.PolicyStatus, None]:
        """Raises `NotFound` before the first, and `Retry` when policyd goes."""
        stream = self._stub.WatchPolicyStatus(_ref_to_wire(ref), metadata=trace_metadata())
        try:
            async for message in stream:
                yield _status(message)
        except grpc.aio.AioRpcError as error:
            raise translate(error, "policyd", service="policyd") from error
        finally:
            stream.cancel()

    async def history(self, ref: model.Ref, limit: int) -> model.PolicyHistory:
        request = policy_pb2.HistoryRequest(ref=_ref_to_wire(ref), limit=limit)
        answer = await call(self._stub.History, request, deadline_s=RPC_DEADLINE_S)
        return model.PolicyHistory(tuple(map(_change, answer.changes)))

    async def rollback(
        self, ref: model.Ref, revision: int, author: str, *, dry_run: bool
    ) -> model.Applied:
        request = policy_pb2.RollbackRequest(
            ref=_ref_to_wire(ref), revision=revision, author=author, dry_run=dry_run
        )
        answer = await call(self._stub.Rollback, request, deadline_s=APPLY_DEADLINE_S)
        return model.Applied(answer.revision, _applied(answer.policies))


@contextmanager
def _guarded(expected: Sequence[int]) -> Iterator[None]:
    """To whoever names what he expects, a conflict is that expectation gone wrong."""
    try:
        yield
    except Conflict as error:
        if not expected:
            raise
        raise Refusal(PRECONDITION_FAILED, str(error)) from error


def _ref_to_wire(ref: model.Ref) -> policy_pb2.PolicyRef:
    return policy_pb2.PolicyRef(kind=ref.kind, namespace=ref.namespace, name=ref.name)


def _status(message: policy_pb2.PolicyStatusResponse) -> model.PolicyStatus:
    nodes = tuple(
        model.OnNode(n.node, n.stage, n.connected, n.realised, n.reason, n.identities)
        for n in message.nodes
    )
    return model.PolicyStatus(
        kind=message.ref.kind,
        namespace=message.ref.namespace,
        name=message.ref.name,
        revision=message.revision,
        author=message.author,
        applied_at=message.applied_at,
        state=message.state,
        selects=message.selects,
        realised=sum(node.stage == "realised" for node in nodes),
        nodes=nodes,
    )


def _change(message: policy_pb2.PolicyChange) -> model.PolicyChange:
    return model.PolicyChange(
        kind=message.ref.kind,
        namespace=message.ref.namespace,
        name=message.ref.name,
        revision=message.revision,
        action=message.action,
        author=message.author,
        changed_at=message.changed_at,
        manifest=message.manifest.decode(errors="replace"),
        diff=message.diff,
    )


def ref_of(message: policy_pb2.PolicyRef) -> model.Ref:
    return model.Ref(message.kind, message.name, message.namespace)


def _applied(messages: Sequence[policy_pb2.AppliedPolicy]) -> tuple[model.AppliedPolicy, ...]:
    return tuple(
        model.AppliedPolicy(m.ref.kind, m.ref.namespace, m.ref.name, m.action) for m in messages
    )


def problem_of(message: policy_pb2.PolicyProblem) -> model.PolicyProblem:
    return model.PolicyProblem(
        severity=message.severity,
        message=message.message,
        source=message.source,
        line=message.line,
        column=message.column,
        path=message.path,
        policy=ref_of(message.ref) if message.HasField("ref") else None,
    )


def _stored(message: policy_pb2.StoredPolicy) -> model.StoredPolicy:
    return model.StoredPolicy(
        kind=message.ref.kind,
        namespace=message.ref.namespace,
        name=message.ref.name,
        manifest=message.manifest.decode(errors="replace"),
        revision=message.revision,
        author=message.author,
        applied_at=message.applied_at,
        state=message.state,
        selects=message.selects,
    )
