"""ipamd, asked on behalf of REST."""

from __future__ import annotations

import grpc.aio
from tessera_wire.ipam.v1 import ipam_pb2, ipam_pb2_grpc

from ipam.block import Family
from services.apid.backends import RPC_DEADLINE_S
from services.apid.ipam import model
from services.wire.client import call


class Ipam:
    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub = ipam_pb2_grpc.IpamServiceStub(to)

    async def pools(self) -> model.Pools:
        request = ipam_pb2.ListPoolsRequest()
        answer = await call(self._stub.ListPools, request, deadline_s=RPC_DEADLINE_S)
        return model.Pools(
            tuple(
                model.Pool(
                    p.name,
                    tuple(p.spec.cidrs),
                    p.spec.block_size,
                    sum(u.capacity for u in p.usage if u.family == Family.V4),
                    sum(u.used for u in p.usage if u.family == Family.V4),
                )
                for p in answer.pools
            )
        )

    async def blocks(self, node: str) -> tuple[model.Block, ...]:
        request = ipam_pb2.ListBlocksRequest(node=node)
        answer = await call(self._stub.ListBlocks, request, deadline_s=RPC_DEADLINE_S)
        return tuple(model.Block(b.cidr, b.pool, b.node, b.used, b.size) for b in answer.blocks)

    async def addresses(self, node: str, pool: str) -> tuple[model.Address, ...]:
        request = ipam_pb2.ListAddressesRequest(node=node, pool=pool)
        answer = await call(self._stub.ListAddresses, request, deadline_s=RPC_DEADLINE_S)
        return tuple(map(_address, answer.addresses))


def _address(message: ipam_pb2.Address) -> model.Address:
    owner = message.owner
    return model.Address(
        ip=message.ip,
        pool=message.pool,
        block=message.block,
        node=message.node,
        owner=model.Owner(owner.namespace, owner.name, owner.interface, owner.uid),
    )
