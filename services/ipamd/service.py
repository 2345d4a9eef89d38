"""The gRPC face of the address service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc.aio
from tessera_wire.ipam.v1 import ipam_pb2 as pb
from tessera_wire.ipam.v1 import ipam_pb2_grpc

from ipam.allocate import Request
from ipam.block import address_text
from ipam.keys import name_problem
from ipam.pool import Pool, chosen
from ipam.view import Assigned, View
from services.ipamd import pools
from services.ipamd.allocator import Allocator
from services.ipamd.collector import Collector
from services.ipamd.journal import Entry, Replayer
from services.ipamd.transactions import record_of
from services.ipamd.usage import Meter
from services.ipamd.windows import Window, Windows
from services.runtime.errors import Conflict, Invalid, NotFound
from services.store.model import Store
from services.wire import addresses as convert

MAX_ENTRIES = 256

_Context = grpc.aio.ServicerContext[Any, Any]


class IpamService(ipam_pb2_grpc.IpamServiceServicer):
    def __init__(
        self,
        *,
        store: Store,
        view: View,
        allocator: Allocator,
        windows: Windows,
        replayer: Replayer,
        collector: Collector,
        usage: Meter,
        node_gone_s: int,
        cooldown_s: int,
    ) -> None:
        self._store = store
        self._view = view
        self._allocator = allocator
        self._windows = windows
        self._replayer = replayer
        self._collector = collector
        self._usage = usage
        self._node_gone_s = node_gone_s
        self._cooldown_s = cooldown_s

    # -------------------------------------------------------------- endpoints

    async def Allocate(self, request: pb.AllocateRequest, context: _Context) -> pb.AllocateResponse:
        _check_node(request.node)
        owner = convert.owner_from_wire(request.owner)
        assigned = await self._allocator.allocate(
            Request(
                node=request.node,
                owner=owner,
                pool=chosen(self._view.pools(), owner.namespace, request.pool),
                wanted=convert.addresses_from_wire(request.addresses),
                retain_s=request.retain_s,
            )
        )
        return pb.AllocateResponse(addresses=map(convert.assigned_to_wire, assigned))

    async def Release(self, request: pb.ReleaseRequest, context: _Context) -> pb.ReleaseResponse:
        owner = convert.owner_from_wire(request.owner)
        return pb.ReleaseResponse(released=await self._allocator.release(owner, request.node))

    # -------------------------------------------------------------- nodes

    async def SyncWindows(
        self, request: pb.SyncWindowsRequest, context: _Context
    ) -> pb.SyncWindowsResponse:
        _check_node(request.node)
        await self._windows.heard(request.node, request.instance, tuple(request.networks))
        synced = await self._windows.sync(
            request.node,
            [
                Window(w.pool, convert.block_from_wire(w.block), w.generation, w.size)
                for w in request.held
            ],
            [(w.pool, convert.family_from_wire(w.family)) for w in request.wanted],
        )
        return pb.SyncWindowsResponse(
            given=[
                pb.GivenWindow(
                    window=_window(given.window),
                    taken=map(convert.assigned_to_wire, given.taken),
                    cooling=map(address_text, given.cooling),
                )
                for given in synced.given
            ],
            gone=map(_window, synced.gone),
            confirmed=map(_window, synced.confirmed),
            recalled=map(_window, synced.recalled),
            pools=[
                pb.Pool(name=pool.name, spec=convert.spec_to_wire(record_of(pool)))
                for pool in self._view.pools()
            ],
            node_gone_s=self._node_gone_s,
            cooldown_s=self._cooldown_s,
        )

    async def Replay(self, request: pb.ReplayRequest, context: _Context) -> pb.ReplayResponse:
        _check_node(request.node)
        if len(request.entries) > MAX_ENTRIES:
            raise Invalid(f"{len(request.entries)} entries at once; send {MAX_ENTRIES} at most")
        entries = [
            Entry(
                convert.owner_from_wire(entry.owner),
                entry.pool,
                convert.addresses_from_wire(entry.addresses),
                entry.released,
                entry.at,
            )
            for entry in request.entries
        ]
        lost = await self._replayer.replay(request.node, entries)
        return pb.ReplayResponse(results=[pb.ReplayResult(lost=words) for words in lost])

    async def ReportInventory(
        self, request: pb.ReportInventoryRequest, context: _Context
    ) -> pb.ReportInventoryResponse:
        _check_node(request.node)
        held = {
            (each.owner.namespace, each.owner.name, each.owner.interface): frozenset(
                convert.addresses_from_wire(each.ips)
            )
            for each in request.held
        }
        suspected, released = await self._collector.report(request.node, held)
        return pb.ReportInventoryResponse(suspected=suspected, released=released)

    # -------------------------------------------------------------- pools

    async def ListPools(
        self, request: pb.ListPoolsRequest, context: _Context
    ) -> pb.ListPoolsResponse:
        return pb.ListPoolsResponse(pools=[self._pool(pool) for pool in self._view.pools()])

    async def PutPool(self, request: pb.PutPoolRequest, context: _Context) -> pb.PutPoolResponse:
        revision = request.revision if request.HasField("revision") else None
        pool, action, written = await pools.put(
            self._store,
            request.name,
            convert.spec_from_wire(request.spec),
            revision,
            dry_run=request.dry_run,
        )
        if not request.dry_run:
            # What is answered can be asked for at once.
            self._view.put_pool(pool, written)
        return pb.PutPoolResponse(pool=self._pool(pool, written), action=action)

    async def DeletePool(
        self, request: pb.DeletePoolRequest, context: _Context
    ) -> pb.DeletePoolResponse:
        revision = request.revision if request.HasField("revision") else None
        return pb.DeletePoolResponse(blocks=await pools.delete(self._store, request.name, revision))

    # -------------------------------------------------------------- what there is

    async def ListBlocks(
        self, request: pb.ListBlocksRequest, context: _Context
    ) -> pb.ListBlocksResponse:
        """Ordered by pool and address. An empty node or pool means every one."""
        blocks = [
            c
            for c in self._view.blocks()
            if request.node in ("", c.node) and request.pool in ("", c.pool)
        ]
        blocks.sort(key=lambda claimed: (claimed.pool, claimed.block))
        return pb.ListBlocksResponse(
            blocks=[convert.claimed_to_wire(c, self._view.used_in(c.pool, c.block)) for c in blocks]
        )

    async def ListAddresses(
        self, request: pb.ListAddressesRequest, context: _Context
    ) -> pb.ListAddressesResponse:
        if request.pool and self._view.pool(request.pool) is None:
            raise NotFound(f"no pool {request.pool!r}")
        found = sorted(self._matching(request), key=lambda row: (row.pool, row.address))
        after = _place(request.after) if request.after else None
        if after is not None:
            found = [row for row in found if (row.pool, row.address) > after]
        limit = request.limit or len(found)
        shown, more = found[:limit], len(found) > limit
        return pb.ListAddressesResponse(
            addresses=map(convert.assigned_to_wire, shown),
            next=f"{shown[-1].pool}/{address_text(shown[-1].address)}" if more else "",
        )

    async def ReleaseAddress(
        self, request: pb.ReleaseAddressRequest, context: _Context
    ) -> pb.ReleaseAddressResponse:
        row = self._view.who_has(convert.address_from_wire(request.ip))
        if row is None:
            raise NotFound(f"nobody has {request.ip}")
        if request.revision and request.revision != row.revision:
            raise Conflict(f"{request.ip} changed hands meanwhile: {row.owner} has it; look again")
        if not request.force and self._collector.in_use(row):
            raise Conflict(
                f"{request.ip} is in use: node {row.node} has endpoint {row.owner}; delete the"
                " endpoint there, or force it and risk that two have one address"
            )
        together = [r for r in self._view.held_by(row.owner) if r.revision == row.revision]
        if not await self._allocator.let_go(together, at_once=True):
            raise Conflict(f"{request.ip} changed hands meanwhile; look again")
        return pb.ReleaseAddressResponse(released=map(convert.assigned_to_wire, together))

    async def ForgetNode(
        self, request: pb.ForgetNodeRequest, context: _Context
    ) -> pb.ForgetNodeResponse:
        released, blocks = await self._collector.forget_by_hand(request.node, force=request.force)
        return pb.ForgetNodeResponse(addresses=released, blocks=blocks)

    async def ListLeaks(
        self, request: pb.ListLeaksRequest, context: _Context
    ) -> pb.ListLeaksResponse:
        return pb.ListLeaksResponse(
            leaks=[
                pb.Leak(
                    address=convert.assigned_to_wire(leak.row),
                    reason=leak.reason,
                    releases_in_s=leak.releases_in_s or 0.0,
                )
                for leak in self._collector.leaks()
            ]
        )

    # -------------------------------------------------------------- inside

    def _pool(self, pool: Pool, revision: int | None = None) -> pb.Pool:
        known = self._view.pool(pool.name) is not None
        return pb.Pool(
            name=pool.name,
            spec=convert.spec_to_wire(record_of(pool)),
            usage=[
                pb.Usage(
                    family=usage.family,
                    capacity=convert.count_to_wire(usage.capacity),
                    used=usage.used,
                    cooling=usage.cooling,
                    retained=usage.retained,
                    in_windows=usage.in_windows,
                    blocks=usage.blocks,
                    per_hour=usage.per_hour,
                    exhausted_in_s=usage.exhausted_in_s or 0.0,
                )
                for usage in self._usage.usage(pool)
            ],
            revision=revision
            if revision is not None
            else (self._view.pool_revision(pool.name) if known else 0),
        )

    def _matching(self, request: pb.ListAddressesRequest) -> Sequence[Assigned]:
        if request.ip:
            row = self._view.who_has(convert.address_from_wire(request.ip))
            found: Sequence[Assigned] = [row] if row is not None else []
        elif request.node:
            found = self._view.on_node(request.node)
        else:
            found = tuple(self._view.assigned())
        namespace, _, name = request.owner.partition("/")
        return [
            row
            for row in found
            if request.node in ("", row.node)
            and request.pool in ("", row.pool)
            and namespace in ("", row.owner.namespace)
            and name in ("", row.owner.name)
        ]


def _window(window: Window) -> pb.Window:
    return pb.Window(
        pool=window.pool,
        block=str(window.block),
        generation=window.generation,
        size=window.size,
    )


def _place(after: str) -> tuple[str, int]:
    pool, _, text = after.partition("/")
    return pool, convert.address_from_wire(text)


def _check_node(node: str) -> None:
    problem = name_problem("node", node)
    if problem is not None:
        raise Invalid(problem)
