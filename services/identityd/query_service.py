"""The gRPC door for questions: messages to values and back, nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from functools import lru_cache
from typing import Any, Final

import grpc.aio
from tessera_wire.identity.v1 import queries_pb2 as pb
from tessera_wire.identity.v1.queries_pb2_grpc import IdentityQueriesServicer

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.identityd.announced import Address
from services.identityd.feed import ChangeKind
from services.identityd.queries import IdentityQueries, Shown, Told, shown_scope
from services.identityd.trend import Trend
from services.identityd.usage import KeyUsage
from services.identityd.view import IdentityView
from services.runtime.clock import Clock

_Context = grpc.aio.ServicerContext[Any, Any]

# A watch that nothing concerns hears how far it is this often, so that it can resume there.
BOOKMARK_S: Final = 15.0
# A burst of allocations, as told to many watches.
CHANGES_KEPT: Final = 4096
_COMMONEST: Final = 3
_ALL_VALUES: Final = 1000

_KINDS: Final = {
    ChangeKind.CREATED: pb.CREATED,
    ChangeKind.DELETED: pb.DELETED,
    ChangeKind.REFERENCED: pb.REFERENCED,
    ChangeKind.RELEASED: pb.RELEASED,
}


class IdentityQueriesDoor(IdentityQueriesServicer):
    def __init__(
        self,
        view: IdentityView,
        queries: IdentityQueries,
        trend: Trend,
        clock: Clock,
        *,
        cluster: str,
        cluster_id: int,
    ) -> None:
        self._view = view
        self._queries = queries
        self._trend = trend
        self._clock = clock
        self._cluster = cluster
        self._cluster_id = cluster_id

    async def List(self, request: pb.ListRequest, context: _Context) -> pb.ListResponse:
        await self._view.ready()
        page = await self._queries.page(
            request.selector, request.limit, request.after, request.revision
        )
        return pb.ListResponse(
            identities=[_identity(shown) for shown in page.identities],
            revision=page.revision,
            more=page.more,
        )

    async def Get(self, request: pb.GetRequest, context: _Context) -> pb.Identity:
        await self._view.ready()
        return _identity(self._queries.get(request.id))

    async def References(
        self, request: pb.ReferencesRequest, context: _Context
    ) -> pb.ReferencesResponse:
        await self._view.ready()
        shown, references = self._queries.references(request.id)
        return pb.ReferencesResponse(
            identity=_identity(shown),
            references=[
                pb.Reference(node=one.node, held=one.held, addresses=map(_address, one.addresses))
                for one in references
            ],
        )

    async def Addresses(
        self, request: pb.AddressesRequest, context: _Context
    ) -> pb.AddressesResponse:
        await self._view.ready()
        ips = await self._chosen(request)
        rows, more = self._queries.rows(ips, request.limit, request.after)
        return pb.AddressesResponse(addresses=map(_address, rows), more=more)

    async def _chosen(self, request: pb.AddressesRequest) -> Iterable[str]:
        match request.WhichOneof("of"):
            case "identity":
                return self._queries.of_identity(request.identity)
            case "ip":
                return [request.ip] if self._view.announced.at(request.ip) else []
            case "cidr":
                return await self._queries.of_cidr(request.cidr)
            case "endpoint":
                return await self._queries.of_endpoint(request.endpoint)
            case "node":
                return await self._queries.of_node(request.node)
            case _:
                return list(self._view.announced)

    async def Stats(self, request: pb.StatsRequest, context: _Context) -> pb.StatsResponse:
        await self._view.ready()
        view, rates = self._view, self._trend.rates()
        return pb.StatsResponse(
            cluster=self._cluster,
            cluster_id=self._cluster_id,
            revision=view.revision,
            total=view.free.total,
            used=view.in_use,
            quarantined=view.in_quarantine,
            free=len(view.free),
            unreferenced=len(view.idle_since()),
            references=view.references,
            addresses=len(view.announced),
            nodes=len(view.announced.nodes),
            namespaces=sum(1 for name in view.usage.namespaces if name),
            window_s=rates.window_s,
            created_per_s=rates.created_per_s,
            collected_per_s=rates.collected_per_s,
            exhausted_in_s=rates.exhausted_in_s,
        )

    async def Usage(self, request: pb.UsageRequest, context: _Context) -> pb.UsageResponse:
        await self._view.ready()
        usage = self._view.usage
        keys = usage.of_keys(request.namespace or None)
        if request.key:
            keys = [one for one in keys if one.key == request.key]
        shown = _ALL_VALUES if request.key else _COMMONEST
        by_size = sorted(usage.namespaces.items(), key=lambda each: (-each[1], each[0]))
        return pb.UsageResponse(
            keys=[self._key_usage(one, request.namespace, shown) for one in keys],
            namespaces=[
                pb.NamespaceUsage(namespace=name, identities=count)
                for name, count in by_size
                if request.namespace in ("", name)
            ],
        )

    def _key_usage(self, key: KeyUsage, namespace: str, shown: int) -> pb.KeyUsage:
        values = self._view.usage.values_of(key.key, shown, namespace or None)
        return pb.KeyUsage(
            key=key.key,
            identities=key.identities,
            values=key.values,
            commonest=[pb.ValueUsage(value=value, identities=count) for value, count in values],
        )

    async def Watch(
        self, request: pb.WatchRequest, context: _Context
    ) -> AsyncIterator[pb.WatchResponse]:
        await self._view.ready()
        told_s: float | None = None  # the first piece goes out whatever it says
        pieces = self._queries.watch(
            request.selector, request.revision, references=request.references
        )
        async for piece in pieces:
            now_s = self._clock.monotonic_s()
            late = told_s is None or now_s - told_s >= BOOKMARK_S
            if late or _says_something(piece):
                told_s = now_s
                yield _told(piece)


def _says_something(piece: Told) -> bool:
    return bool(piece.changes or piece.listed or piece.reset or piece.synced)


def _told(piece: Told) -> pb.WatchResponse:
    changes = [_change(pb.LISTED, number, labels) for number, labels in piece.listed]
    changes += [_change(_KINDS[c.kind], c.number, c.labels, c.node) for c in piece.changes]
    return pb.WatchResponse(
        reset=piece.reset, changes=changes, revision=piece.revision, synced=piece.synced
    )


# Every watch that the change concerns is told the same.
@lru_cache(maxsize=CHANGES_KEPT)
def _change(
    kind: pb.ChangeKind.ValueType, number: NumericIdentity, labels: Labels, node: str = ""
) -> pb.Change:
    return pb.Change(
        kind=kind,
        id=number,
        labels=labels.canonical(),
        scope=shown_scope(number),
        node=node,
    )


def _identity(shown: Shown) -> pb.Identity:
    return pb.Identity(
        id=shown.number,
        labels=shown.labels.canonical(),
        nodes=shown.nodes,
        scope=shown_scope(shown.number),
        addresses=shown.addresses,
    )


def _address(address: Address) -> pb.Address:
    return pb.Address(
        ip=address.ip,
        identity=address.identity,
        host_ip=address.host_ip,
        namespace=address.namespace,
        name=address.name,
        node=address.node,
    )
