"""Addresses for endpoints, from ipamd."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tessera_wire.ipam.v1 import ipam_pb2 as pb

from datapath.agent.record import EndpointRecord
from services.wire import convert
from services.wire.client import call

if TYPE_CHECKING:
    from tessera_wire.ipam.v1.ipam_pb2_grpc import IpamServiceAsyncStub

RPC_DEADLINE_S = 5.0


class Addressing:
    def __init__(self, stub: IpamServiceAsyncStub, node: str) -> None:
        self._stub = stub
        self._node = node

    async def allocate(self, record: EndpointRecord) -> int:
        """The same address again for the same endpoint."""
        request = pb.AllocateRequest(node=self._node, owner=_owner(record))
        answer = await call(self._stub.Allocate, request, deadline_s=RPC_DEADLINE_S)
        return convert.address_from_wire(answer.address.ip)

    async def release(self, record: EndpointRecord) -> None:
        """Idempotent."""
        request = pb.ReleaseRequest(node=self._node, owner=_owner(record))
        await call(self._stub.Release, request, deadline_s=RPC_DEADLINE_S)


def _owner(record: EndpointRecord) -> pb.Owner:
    return pb.Owner(
        namespace=record.namespace,
        name=record.name,
        interface=record.interface,
        uid=record.outer,
    )
