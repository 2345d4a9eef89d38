"""identityd, asked on behalf of REST."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Final

import grpc.aio
from tessera_wire.identity.v1 import queries_pb2 as pb
from tessera_wire.identity.v1.queries_pb2_grpc import IdentityQueriesStub

from services.apid.backends import RPC_DEADLINE_S
from services.apid.identities import model
from services.apid.rest.errors import CURSOR_EXPIRED, Refusal
from services.runtime.errors import Conflict
from services.wire.client import call, receive

# Share of the numbers that is taken.
_HIGH: Final = 0.80
_CRITICAL: Final = 0.95


class Identities:
    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub = IdentityQueriesStub(to)

    async def list(
        self, selector: str, limit: int, after: int, revision: int
    ) -> tuple[tuple[model.Identity, ...], int, bool]:
        """A page, its revision, and whether there are more."""
        request = pb.ListRequest(selector=selector, limit=limit, after=after, revision=revision)
        try:
            answer = await call(self._stub.List, request, deadline_s=RPC_DEADLINE_S)
        except Conflict as error:
            raise Refusal(CURSOR_EXPIRED, str(error)) from error
        return tuple(map(_identity, answer.identities)), answer.revision, answer.more

    async def get(self, number: int) -> model.Identity:
        return _identity(
            await call(self._stub.Get, pb.GetRequest(id=number), deadline_s=RPC_DEADLINE_S)
        )

    async def references(self, number: int) -> model.References:
        request = pb.ReferencesRequest(id=number)
        answer = await call(self._stub.References, request, deadline_s=RPC_DEADLINE_S)
        return model.References(
            answer.identity.id,
            labels_of(answer.identity.labels),
            tuple(
                model.Reference(one.node, one.held, tuple(map(_endpoint, one.addresses)))
                for one in answer.references
            ),
        )

    async def endpoints(
        self, request: pb.AddressesRequest
    ) -> tuple[tuple[model.Endpoint, ...], bool]:
        """A page, and whether there are more."""
        answer = await call(self._stub.Addresses, request, deadline_s=RPC_DEADLINE_S)
        return tuple(map(_endpoint, answer.addresses)), answer.more

    async def stats(self) -> model.Stats:
        answer = await call(self._stub.Stats, pb.StatsRequest(), deadline_s=RPC_DEADLINE_S)
        return model.Stats(
            cluster=answer.cluster,
            cluster_id=answer.cluster_id,
            revision=answer.revision,
            total=answer.total,
            used=answer.used,
            quarantined=answer.quarantined,
            free=answer.free,
            pressure=_pressure(1 - answer.free / answer.total),
            unreferenced=answer.unreferenced,
            references=answer.references,
            addresses=answer.addresses,
            nodes=answer.nodes,
            namespaces=answer.namespaces,
            window_s=answer.window_s,
            created_per_s=answer.created_per_s,
            collected_per_s=answer.collected_per_s,
            exhausted_in_s=answer.exhausted_in_s if answer.HasField("exhausted_in_s") else None,
        )

    async def usage(self, namespace: str, key: str) -> model.Usage:
        request = pb.UsageRequest(namespace=namespace, key=key)
        answer = await call(self._stub.Usage, request, deadline_s=RPC_DEADLINE_S)
        return model.Usage(
            tuple(map(_key_usage, answer.keys)),
            tuple(model.NamespaceUsage(n.namespace, n.identities) for n in answer.namespaces),
        )

    async def watch(self, request: pb.WatchRequest) -> AsyncGenerator[pb.WatchResponse, None]:
        """Returns once identityd has begun to tell."""
        told = receive(self._stub.Watch, request)
        return _resumed(await anext(told), told)


async def _resumed(
    first: pb.WatchResponse, rest: AsyncGenerator[pb.WatchResponse, None]
) -> AsyncGenerator[pb.WatchResponse, None]:
    try:
        yield first
        async for one in rest:
            yield one
    finally:
        await rest.aclose()


def _pressure(taken: float) -> str:
    if taken >= _CRITICAL:
        return "critical"
    return "high" if taken >= _HIGH else "none"


def _identity(message: pb.Identity) -> model.Identity:
    labels, nodes = labels_of(message.labels), tuple(message.nodes)
    return model.Identity(message.id, labels, nodes, message.scope, message.addresses)


def labels_of(canonical: str) -> tuple[str, ...]:
    """As people write them: without the "=" of an empty value."""
    return tuple(text.removesuffix("=") for text in canonical.split(";")[:-1])


def _endpoint(message: pb.Address) -> model.Endpoint:
    return model.Endpoint(
        ip=message.ip,
        identity=message.identity,
        namespace=message.namespace,
        name=message.name,
        node=message.node,
        host_ip=message.host_ip,
    )


def _key_usage(message: pb.KeyUsage) -> model.KeyUsage:
    return model.KeyUsage(
        message.key,
        message.identities,
        message.values,
        tuple(model.ValueUsage(one.value, one.identities) for one in message.commonest),
    )
