"""ipamd, asked on behalf of REST."""

from __future__ import annotations

import grpc.aio
from tessera_wire.ipam.v1 import ipam_pb2 as pb
from tessera_wire.ipam.v1 import ipam_pb2_grpc

from services.apid.backends import RPC_DEADLINE_S
from services.apid.ipam import model
from services.runtime.errors import NotFound
from services.wire.client import call

# All of a node with thousands of endpoints.
FORGET_DEADLINE_S = 60.0


class Ipam:
    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub = ipam_pb2_grpc.IpamServiceStub(to)

    # -------------------------------------------------------------- pools

    async def pools(self) -> model.Pools:
        request = pb.ListPoolsRequest()
        answer = await call(self._stub.ListPools, request, deadline_s=RPC_DEADLINE_S)
        return model.Pools(tuple(map(_pool, answer.pools)))

    async def pool(self, name: str) -> model.Pool:
        pools = (await self.pools()).pools
        found = next((pool for pool in pools if pool.name == name), None)
        if found is None:
            known = ", ".join(pool.name for pool in pools) or "none"
            raise NotFound(f"no pool {name!r}; known: {known}")
        return found

    async def put_pool(
        self, name: str, spec: model.PoolSpec, revision: int | None, *, dry_run: bool
    ) -> model.PoolWritten:
        request = pb.PutPoolRequest(
            name=name,
            spec=pb.PoolSpec(
                cidrs=spec.cidrs,
                block_size=spec.block_size,
                block_size_v6=spec.block_size_v6,
                reserved=spec.reserved,
                disabled=spec.disabled,
                namespaces=spec.namespaces,
                strict=spec.strict,
                max_blocks=spec.max_blocks,
                local=spec.local,
                cooldown_s=spec.cooldown_s,
            ),
            revision=revision,
            dry_run=dry_run,
        )
        answer = await call(self._stub.PutPool, request, deadline_s=RPC_DEADLINE_S)
        return model.PoolWritten(_pool(answer.pool), answer.action)

    async def delete_pool(self, name: str, revision: int | None) -> model.PoolDeleted:
        request = pb.DeletePoolRequest(name=name, revision=revision)
        answer = await call(self._stub.DeletePool, request, deadline_s=RPC_DEADLINE_S)
        return model.PoolDeleted(answer.blocks)

    # -------------------------------------------------------------- addresses

    async def blocks(self, node: str, pool: str) -> tuple[model.Block, ...]:
        request = pb.ListBlocksRequest(node=node, pool=pool)
        answer = await call(self._stub.ListBlocks, request, deadline_s=RPC_DEADLINE_S)
        return tuple(
            model.Block(b.cidr, b.pool, b.node, b.used, b.size, b.window) for b in answer.blocks
        )

    async def addresses(self, request: pb.ListAddressesRequest) -> model.Addresses:
        """`next` is ipamd's, to be given as `after`."""
        answer = await call(self._stub.ListAddresses, request, deadline_s=RPC_DEADLINE_S)
        return model.Addresses(tuple(map(_address, answer.addresses)), answer.next)

    async def who_has(self, ip: str) -> model.Address:
        found = (await self.addresses(pb.ListAddressesRequest(ip=ip))).addresses
        if not found:
            raise NotFound(f"nobody has {ip}")
        return found[0]

    async def release(self, ip: str, revision: int, *, force: bool) -> model.Released:
        request = pb.ReleaseAddressRequest(ip=ip, revision=revision, force=force)
        answer = await call(self._stub.ReleaseAddress, request, deadline_s=RPC_DEADLINE_S)
        return model.Released(tuple(map(_address, answer.released)))

    async def forget_node(self, node: str, *, force: bool) -> model.NodeForgotten:
        request = pb.ForgetNodeRequest(node=node, force=force)
        answer = await call(self._stub.ForgetNode, request, deadline_s=FORGET_DEADLINE_S)
        return model.NodeForgotten(answer.addresses, answer.blocks)

    async def leaks(self) -> model.Leaks:
        answer = await call(self._stub.ListLeaks, pb.ListLeaksRequest(), deadline_s=RPC_DEADLINE_S)
        return model.Leaks(
            tuple(
                model.Leak(_address(leak.address), leak.reason, leak.releases_in_s or None)
                for leak in answer.leaks
            )
        )


def _pool(message: pb.Pool) -> model.Pool:
    spec = message.spec
    return model.Pool(
        message.name,
        model.PoolSpec(
            cidrs=tuple(spec.cidrs),
            block_size=spec.block_size,
            block_size_v6=spec.block_size_v6,
            reserved=tuple(spec.reserved),
            disabled=tuple(spec.disabled),
            namespaces=tuple(spec.namespaces),
            strict=spec.strict,
            max_blocks=spec.max_blocks,
            local=spec.local,
            cooldown_s=spec.cooldown_s if spec.HasField("cooldown_s") else None,
        ),
        tuple(map(_usage, message.usage)),
        message.revision,
    )


def _usage(message: pb.Usage) -> model.PoolUsage:
    return model.PoolUsage(
        message.family,
        message.capacity,
        message.used,
        message.cooling,
        message.retained,
        message.in_windows,
        message.blocks,
        round(message.per_hour, 1),
        round(message.exhausted_in_s) or None,
    )


def _address(message: pb.Address) -> model.Address:
    owner = message.owner
    return model.Address(
        ip=message.ip,
        pool=message.pool,
        block=message.block,
        node=message.node,
        owner=model.Owner(owner.namespace, owner.name, owner.interface, owner.uid),
        revision=message.revision,
        retained_until=message.retained_until,
    )
