"""/v1/ipam: pools, blocks and addresses.

The entity tag of a pool or an address is its revision in the store: a write under If-Match is
compared here and, in the same transaction as the write, by ipamd.
"""

from __future__ import annotations

from ipaddress import ip_network

import msgspec
from tessera_wire.ipam.v1 import ipam_pb2 as pb

from services.apid.backends import Backends
from services.apid.ipam import model
from services.apid.ipam.backend import Ipam
from services.apid.rest import pages
from services.apid.rest.conditional import NEW
from services.apid.rest.errors import BAD_BODY, PRECONDITION_FAILED, Refusal
from services.apid.rest.params import Chosen, Paged
from services.apid.rest.route import Answer, AnyRoute, Body, Call, Nothing, Route
from services.runtime.errors import Conflict, Invalid, NotFound


class PoolPath(Nothing, frozen=True):
    name: str


class PutQuery(Nothing, frozen=True):
    """`create`: refuse when it exists."""

    name: str
    create: bool = False
    dry_run: bool = False


class BlockQuery(Paged, frozen=True, kw_only=True):
    node: str = ""
    pool: str = ""


class AddressQuery(Paged, frozen=True, kw_only=True):
    """`owner`: namespace/name, or namespace/ for all of one."""

    node: str = ""
    pool: str = ""
    owner: str = ""


class AddressPath(Nothing, frozen=True):
    ip: str


class ReleaseQuery(Nothing, frozen=True):
    """`force`: though its node says that it is in use."""

    ip: str
    force: bool = False


class NodePath(Nothing, frozen=True):
    """`force`: though it was heard from a moment ago."""

    node: str
    force: bool = False


class IpamHandlers:
    def __init__(self, ipam: Ipam) -> None:
        self._ipam = ipam

    async def list_pools(self, _call: Call[Chosen]) -> model.Pools:
        return await self._ipam.pools()

    async def get_pool(self, call: Call[PoolPath]) -> Answer:
        pool = await self._ipam.pool(call.takes.name)
        return Answer(pool, str(pool.revision))

    async def put_pool(self, call: Call[PutQuery]) -> model.PoolWritten:
        try:
            spec = msgspec.json.decode(call.body, type=model.PoolSpec)
        except msgspec.DecodeError as error:
            raise Refusal(BAD_BODY, f"body: {error}") from error
        name = call.takes.name
        create = call.takes.create or call.if_match == (NEW,)
        revision = 0 if create else await self._pool_revision(name, call.if_match)
        return await self._ipam.put_pool(name, spec, revision, dry_run=call.takes.dry_run)

    async def delete_pool(self, call: Call[PoolPath]) -> model.PoolDeleted:
        name = call.takes.name
        return await self._ipam.delete_pool(name, await self._pool_revision(name, call.if_match))

    async def list_blocks(self, call: Call[BlockQuery]) -> model.Blocks:
        blocks = await self._ipam.blocks(call.takes.node, call.takes.pool)
        ordered = sorted(blocks, key=_block_key)
        return model.Blocks(*pages.page(call.takes, ordered, _block_key))

    async def list_addresses(self, call: Call[AddressQuery]) -> model.Addresses:
        query = call.takes
        request = pb.ListAddressesRequest(
            node=query.node,
            pool=query.pool,
            owner=query.owner,
            limit=query.limit,
            after=pages.position(query, str) or "",
        )
        found = await self._ipam.addresses(request)
        following = pages.cursor(query, found.next) if found.next else ""
        return model.Addresses(found.addresses, following)

    async def who_has(self, call: Call[AddressPath]) -> Answer:
        address = await self._ipam.who_has(call.takes.ip)
        return Answer(address, str(address.revision))

    async def release(self, call: Call[ReleaseQuery]) -> model.Released:
        revision = 0
        if call.if_match is not None:
            revision = (await self._ipam.who_has(call.takes.ip)).revision
            _refuse_other(f"address {call.takes.ip}", revision, call.if_match)
        return await self._ipam.release(call.takes.ip, revision, force=call.takes.force)

    async def list_leaks(self, _call: Call[Chosen]) -> model.Leaks:
        return await self._ipam.leaks()

    async def forget_node(self, call: Call[NodePath]) -> model.NodeForgotten:
        return await self._ipam.forget_node(call.takes.node, force=call.takes.force)

    async def _pool_revision(self, name: str, if_match: tuple[str, ...] | None) -> int | None:
        if if_match is None:
            return None
        revision = (await self._ipam.pool(name)).revision
        _refuse_other(f"pool {name}", revision, if_match)
        return revision


def routes(backends: Backends) -> tuple[AnyRoute, ...]:
    on = IpamHandlers(Ipam(backends.ipamd))
    changes = (Invalid, Conflict, NotFound)
    return (
        Route(
            "GET", "/v1/ipam/pools", "Address pools, their use, and when it will be used up",
            on.list_pools, Chosen, model.Pools, items="pools",
        ),
        Route(
            "GET", "/v1/ipam/pools/{name}", "One pool",
            on.get_pool, PoolPath, model.Pool, raises=(NotFound,),
        ),
        Route(
            "PUT", "/v1/ipam/pools/{name}", "Create or change a pool; refused while it would lose",
            on.put_pool, PutQuery, model.PoolWritten,
            body=(Body("application/json", model.PoolSpec),), raises=changes, guarded=True,
        ),
        Route(
            "DELETE", "/v1/ipam/pools/{name}", "Delete a pool of which no address is in use",
            on.delete_pool, PoolPath, model.PoolDeleted, raises=changes, guarded=True,
        ),
        Route(
            "GET", "/v1/ipam/blocks", "Which node holds which block",
            on.list_blocks, BlockQuery, model.Blocks, items="blocks",
        ),
        Route(
            "GET", "/v1/ipam/addresses", "Addresses and their owners",
            on.list_addresses, AddressQuery, model.Addresses, items="addresses",
            raises=(NotFound, Invalid),
        ),
        Route(
            "GET", "/v1/ipam/addresses/{ip}", "Who has this address",
            on.who_has, AddressPath, model.Address, raises=(NotFound, Invalid),
        ),
        Route(
            "DELETE", "/v1/ipam/addresses/{ip}", "Release it by hand, with its owner's others",
            on.release, ReleaseQuery, model.Released, raises=changes, guarded=True,
        ),
        Route(
            "GET", "/v1/ipam/leaks", "Addresses whose owner is doubted, and why",
            on.list_leaks, Chosen, model.Leaks, items="leaks",
        ),
        Route(
            "DELETE", "/v1/ipam/nodes/{node}", "Release all of a node that will not come back",
            on.forget_node, NodePath, model.NodeForgotten, raises=changes,
        ),
    )  # fmt: skip


def _refuse_other(what: str, revision: int, if_match: tuple[str, ...]) -> None:
    if str(revision) not in if_match:
        raise Refusal(
            PRECONDITION_FAILED, f"{what} is now {revision}, which If-Match does not name"
        )


def _block_key(block: model.Block) -> tuple[str, ...]:
    network = ip_network(block.cidr)
    return (block.pool, str(network.version), network.network_address.packed.hex())
