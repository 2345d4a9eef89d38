"""The gRPC door: messages to values and back, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from msgspec import UNSET
from tessera_wire.identity.v1 import identity_pb2 as pb
from tessera_wire.identity.v1.identity_pb2_grpc import IdentityServiceServicer

from identity.numbers import NumericIdentity
from services.identityd.allocator import Allocated, Allocator, Item
from services.identityd.announce import Announcer
from services.identityd.published import AddressValue
from services.identityd.references import release
from services.identityd.rules import LabelRules, RulesInForce, set_rules
from services.identityd.session import Sessions, check_lease, check_node
from services.identityd.view import IdentityView
from services.runtime.errors import (
    Conflict,
    Exhausted,
    Invalid,
    Retry,
    TesseraError,
)
from services.store.model import LeaseId, Revision, Store
from services.wire.convert import labels_to_wire

_Context = grpc.aio.ServicerContext[Any, Any]

_KINDS: dict[type[TesseraError], str] = {
    Invalid: "invalid",
    Exhausted: "exhausted",
    Conflict: "conflict",
    Retry: "retry",
}


class IdentityServicer(IdentityServiceServicer):
    def __init__(
        self,
        store: Store,
        view: IdentityView,
        allocator: Allocator,
        rules: RulesInForce,
        announcer: Announcer,
        sessions: Sessions,
        *,
        cluster: str,
        cluster_id: int,
    ) -> None:
        self._store = store
        self._view = view
        self._allocator = allocator
        self._rules = rules
        self._announcer = announcer
        self._sessions = sessions
        self._cluster = cluster
        self._cluster_id = cluster_id

    async def OpenSession(self, request: pb.OpenSessionRequest, context: _Context) -> pb.Session:
        session = await self._sessions.open(
            request.node,
            LeaseId(request.previous_lease),
            request.ttl_s,
            request.internal_ip,
            request.internal_ip6,
        )
        return pb.Session(
            lease=session.lease,
            ttl_s=session.ttl_s,
            resumed=session.resumed,
            cluster=self._cluster,
            cluster_id=self._cluster_id,
        )

    async def ExtendSession(
        self, request: pb.ExtendSessionRequest, context: _Context
    ) -> pb.Session:
        lease, ttl_s = await self._sessions.extend(request.node, request.ttl_s)
        return pb.Session(
            lease=lease, ttl_s=ttl_s, cluster=self._cluster, cluster_id=self._cluster_id
        )

    async def KeepAlive(
        self, request: pb.KeepAliveRequest, context: _Context
    ) -> pb.KeepAliveResponse:
        left_s = await self._sessions.keep_alive(map(LeaseId, (request.lease, *request.more)))
        return pb.KeepAliveResponse(ttl_s=left_s)

    async def CloseSession(
        self, request: pb.CloseSessionRequest, context: _Context
    ) -> pb.CloseSessionResponse:
        await self._sessions.close(request.node, LeaseId(request.lease))
        return pb.CloseSessionResponse()

    async def Allocate(self, request: pb.AllocateRequest, context: _Context) -> pb.AllocateResponse:
        check_node(request.node)
        check_lease(LeaseId(request.lease))
        items = [
            # Parsed item by item: one bad label set must not fail its neighbours.
            Item(tuple(item.labels.labels), NumericIdentity(item.previous))
            for item in request.items
        ]
        results = await self._allocator.allocate(request.node, LeaseId(request.lease), items)
        return pb.AllocateResponse(results=[_result(result) for result in results])

    async def Release(self, request: pb.ReleaseRequest, context: _Context) -> pb.ReleaseResponse:
        check_node(request.node)
        await release(self._store, request.node, map(NumericIdentity, request.identities))
        return pb.ReleaseResponse()

    async def Announce(self, request: pb.AnnounceRequest, context: _Context) -> pb.AnnounceResponse:
        check_node(request.node)
        check_lease(LeaseId(request.lease))
        values = [_address(item) for item in request.items]
        await self._announcer.announce(request.node, LeaseId(request.lease), values)
        return pb.AnnounceResponse()

    async def Withdraw(self, request: pb.WithdrawRequest, context: _Context) -> pb.WithdrawResponse:
        check_node(request.node)
        await self._announcer.withdraw(request.host_ip, request.ips)
        return pb.WithdrawResponse()

    async def FollowLabelRules(
        self, request: pb.FollowLabelRulesRequest, context: _Context
    ) -> AsyncIterator[pb.LabelRulesVersion]:
        version = ""
        while True:
            version = await self._rules.news(version)
            yield pb.LabelRulesVersion(version=version)

    async def GetLabelRules(
        self, request: pb.GetLabelRulesRequest, context: _Context
    ) -> pb.LabelRules:
        await self._rules.ready()
        return _rules_to_wire(self._rules)

    async def SetLabelRules(
        self, request: pb.SetLabelRulesRequest, context: _Context
    ) -> pb.LabelRules:
        """Answered once this replica follows the new rules."""
        await self._rules.ready()
        wanted = request.rules
        rules = LabelRules(
            tuple(wanted.label_filter),
            wanted.policy_relevant,
            wanted.namespace_quota,
            wanted.warn_values or LabelRules().warn_values,
        )
        revision = await set_rules(self._store, rules, Revision(wanted.revision))
        await self._rules.reached(revision)
        return _rules_to_wire(self._rules)


def _result(result: Allocated | TesseraError) -> pb.AllocateResult:
    if isinstance(result, TesseraError):
        kind = next(kind for cls, kind in _KINDS.items() if isinstance(result, cls))
        return pb.AllocateResult(problem=pb.Problem(kind=kind, message=str(result)))
    return pb.AllocateResult(
        identity=result.number,
        labels=labels_to_wire(result.labels),
        remapped=result.remapped,
        revision=result.revision,
    )


def _rules_to_wire(rules: RulesInForce) -> pb.LabelRules:
    now = rules.rules
    return pb.LabelRules(
        label_filter=now.label_filter,
        policy_relevant=now.policy_relevant,
        namespace_quota=now.namespace_quota,
        warn_values=now.warn_values,
        revision=rules.revision,
        version=rules.version,
        relevant_keys=sorted(rules.relevant or ()),
    )


def _address(item: pb.Announcement) -> AddressValue:
    return AddressValue(
        ip=item.ip,
        host_ip=item.host_ip,
        number=item.identity,
        namespace=item.namespace or UNSET,
        name=item.name or UNSET,
        uid=item.uid or UNSET,
    )
