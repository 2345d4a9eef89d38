"""The gRPC face of the address service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc.aio
from tessera_wire.ipam.v1 import ipam_pb2, ipam_pb2_grpc

from ipam.allocate import Request
from ipam.keys import name_problem
from ipam.view import View
from services.ipamd.allocator import Allocator
from services.runtime.errors import Invalid, NotFound
from services.wire import convert

DEFAULT_POOL = "default"

_Context = grpc.aio.ServicerContext[Any, Any]


class IpamService(ipam_pb2_grpc.IpamServiceServicer):
    def __init__(self, view: View, allocator: Allocator) -> None:
        self._view = view
        self._allocator = allocator

    async def Allocate(
        self, request: ipam_pb2.AllocateRequest, context: _Context
    ) -> ipam_pb2.AllocateResponse:
        _check_node(request.node)
        assigned = await self._allocator.allocate(
            Request(
                node=request.node,
                owner=convert.owner_from_wire(request.owner),
                pool=request.pool or DEFAULT_POOL,
                wanted=_wanted(request.addresses),
            )
        )
        return ipam_pb2.AllocateResponse(addresses=[convert.assigned_to_wire(assigned)])

    async def Release(
        self, request: ipam_pb2.ReleaseRequest, context: _Context
    ) -> ipam_pb2.ReleaseResponse:
        owner = convert.owner_from_wire(request.owner)
        return ipam_pb2.ReleaseResponse(released=await self._allocator.release(owner, request.node))

    async def ListPools(
        self, request: ipam_pb2.ListPoolsRequest, context: _Context
    ) -> ipam_pb2.ListPoolsResponse:
        return ipam_pb2.ListPoolsResponse(
            pools=[convert.pool_to_wire(p, self._view.used(p.name)) for p in self._view.pools()]
        )

    async def ListBlocks(
        self, request: ipam_pb2.ListBlocksRequest, context: _Context
    ) -> ipam_pb2.ListBlocksResponse:
        """Ordered by pool and address. An empty node means every node."""
        blocks = [c for c in self._view.blocks() if request.node in ("", c.node)]
        blocks.sort(key=lambda claimed: (claimed.pool, claimed.block))
        return ipam_pb2.ListBlocksResponse(
            blocks=[convert.claimed_to_wire(c, self._view.used_in(c.pool, c.block)) for c in blocks]
        )

    async def ListAddresses(
        self, request: ipam_pb2.ListAddressesRequest, context: _Context
    ) -> ipam_pb2.ListAddressesResponse:
        """Ordered by pool and address. An empty node or pool means every one."""
        if request.pool and self._view.pool(request.pool) is None:
            raise NotFound(f"no pool {request.pool!r}")
        rows = [
            a
            for a in self._view.assigned()
            if request.node in ("", a.node) and request.pool in ("", a.pool)
        ]
        rows.sort(key=lambda assigned: (assigned.pool, assigned.address))
        return ipam_pb2.ListAddressesResponse(addresses=[convert.assigned_to_wire(a) for a in rows])


def _wanted(addresses: Sequence[str]) -> int | None:
    if len(addresses) > 1:
        raise Invalid(f"addresses {', '.join(addresses)}: give one of each family")
    return convert.address_from_wire(addresses[0]) if addresses else None


def _check_node(node: str) -> None:
    problem = name_problem("node", node)
    if problem is not None:
        raise Invalid(problem)
