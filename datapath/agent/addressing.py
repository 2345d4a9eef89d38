"""Addresses for endpoints, from ipamd."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING

from tessera_wire.ipam.v1 import ipam_pb2 as pb

from datapath.agent.record import EndpointRecord
from services.wire.client import call

if TYPE_CHECKING:
    from tessera_wire.ipam.v1.ipam_pb2_grpc import IpamServiceAsyncStub

RPC_DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True)
class Given:
    """An endpoint's addresses, as numbers; 0 where its pool has none of that family."""

    ipv4: int = 0
    ipv6: int = 0


class Addressing:
    def __init__(self, stub: IpamServiceAsyncStub, node: str) -> None:
        self._stub = stub
        self._node = node

    async def allocate(self, record: EndpointRecord) -> Given:
        """The same addresses again for the same endpoint."""
        request = pb.AllocateRequest(node=self._node, owner=_owner(record))
        answer = await call(self._stub.Allocate, request, deadline_s=RPC_DEADLINE_S)
        return given(answer.addresses)

    async def release(self, record: EndpointRecord) -> None:
        """Idempotent."""
        request = pb.ReleaseRequest(node=self._node, owner=_owner(record))
        await call(self._stub.Release, request, deadline_s=RPC_DEADLINE_S)


def given(addresses: Iterable[pb.Address]) -> Given:
    numbers = [ip_address(address.ip) for address in addresses]
    return Given(
        next((int(ip) for ip in numbers if ip.version == 4), 0),
        next((int(ip) for ip in numbers if ip.version == 6), 0),
    )


def _owner(record: EndpointRecord) -> pb.Owner:
    return pb.Owner(
        namespace=record.namespace,
        name=record.name,
        interface=record.interface,
        uid=record.outer,
    )
