"""Addresses for endpoints: out of the node's windows, else from ipamd.

    endpoint ──► own window? ──► log on disk ──► the address       no network, no control plane
                     │ none              └────► replayed to ipamd when it is there
                     └──► ipamd

Kept going beside it: the windows in step with ipamd (asked for when they run low, narrowed when it
calls them back, dropped when they stand empty), and the inventory, by which ipamd finds addresses
that nobody here knows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING

from tessera_wire.ipam.v1 import ipam_pb2 as pb

from datapath.agent.addresslog import AddressLog
from datapath.agent.record import EndpointRecord
from ipam.block import Block, address_text, parse_block
from ipam.keys import Owner
from ipam.window import (
    Entry,
    Freed,
    Gained,
    Gone,
    Heard,
    Holding,
    Narrowed,
    Told,
    Took,
    Window,
    who_is,
)
from services.runtime.clock import Clock
from services.runtime.errors import TesseraError
from services.runtime.log import logger
from services.wire import addresses as convert
from services.wire.client import call

if TYPE_CHECKING:
    from tessera_wire.ipam.v1.ipam_pb2_grpc import IpamServiceAsyncStub

log = logger(__name__)

RPC_DEADLINE_S = 5.0
SYNC_PAUSE_S = 5.0
# So many rounds of syncing between two inventories.
INVENTORY_ROUNDS = 6
# Entries told at once; one transaction of the store.
BATCH = 64
# What was heard is written again when it is this old: a restart without ipamd needs it.
HEARD_WRITTEN_S = 60.0


@dataclass(frozen=True, slots=True)
class Given:
    """An endpoint's addresses, as numbers; 0 where its pool has none of that family."""

    ipv4: int = 0
    ipv6: int = 0


class Addressing:
    """`records`: every endpoint there is, in whatever state. `networks`: those the node is in."""

    def __init__(
        self,
        stub: IpamServiceAsyncStub,
        node: str,
        *,
        journal: AddressLog,
        records: Callable[[], Iterable[EndpointRecord]],
        networks: Callable[[], Iterable[str]],
        clock: Clock,
    ) -> None:
        self._stub = stub
        self._node = node
        self._journal = journal
        self._local = journal.local
        self._records = records
        self._networks = networks
        self._clock = clock
        self._empty_since: dict[tuple[str, Block], float] = {}
        self._hurry = asyncio.Event()
        self._untold = asyncio.Event()
        if self._local.pending:
            self._untold.set()
        self.lost: dict[str, str] = {}

    # -------------------------------------------------------------- endpoints

    async def allocate(self, record: EndpointRecord) -> Given:
        """The same addresses again for the same endpoint."""
        owner, now_s = owner_of(record), self._clock.now_s()
        wanted = convert.addresses_from_wire(record.static)
        chosen = None
        if not record.retain_s:
            chosen = self._local.choose(owner, record.pool, wanted, now_s)
        match chosen:
            case Holding():
                # What could not be written before must be by now.
                await self._journal.append()
                return given(map(address_text, chosen.addresses))
            case Took():
                await self._journal.append(chosen)
                self._untold.set()
                if any(name == chosen.pool for name, _ in self._local.wishes(now_s)):
                    self._hurry.set()
                return given(chosen.ips)
        # The pool may be one that has no window here yet.
        self._hurry.set()
        request = pb.AllocateRequest(
            node=self._node,
            owner=convert.owner_to_wire(owner),
            pool=record.pool,
            addresses=record.static,
            retain_s=record.retain_s,
        )
        answer = await call(self._stub.Allocate, request, deadline_s=RPC_DEADLINE_S)
        return given(address.ip for address in answer.addresses)

    async def release(self, record: EndpointRecord) -> None:
        """Idempotent."""
        owner = owner_of(record)
        holding = self._local.held.get(who_is(owner))
        if holding is not None and holding.owner.uid == owner.uid:
            await self._journal.append(Freed(holding.owner, self._clock.now_s()))
            self._untold.set()
            return
        if not record.interface:
            return  # found in the kernel without a name; ipamd misses it in the inventory
        request = pb.ReleaseRequest(node=self._node, owner=convert.owner_to_wire(owner))
        await call(self._stub.Release, request, deadline_s=RPC_DEADLINE_S)

    async def leave(self) -> None:
        """Gives everything back: what endpoints have, and the windows. Raises `Retry` while ipamd
        is away; then it may be asked again."""
        for record in self._records():
            await self.release(record)
        now_s = self._clock.now_s()
        await self._journal.append(*[Freed(h.owner, now_s) for h in self._local.held.values()])
        while self._local.pending:
            await self.tell()
        for window in tuple(self._local.windows.values()):
            await self._narrow(window, 0)
        while self._local.windows:
            await self.sync(wishing=False)

    def status(self) -> dict[str, object]:
        """`untold`: given or taken back, and not yet in the store. `lost`: addresses of endpoints
        here that another was given, after this node was taken for dead; with the words."""
        windows = self._local.windows.values()
        return {
            "windows": [f"{window.block} first {window.size}" for window in windows],
            "held": len(self._local.held),
            "untold": len(self._local.pending),
            "lost": dict(self.lost),
        }

    # -------------------------------------------------------------- beside it

    async def settle(self) -> None:
        """At start, before anything is handed out: the log and the endpoints say the same."""
        now_s = self._clock.now_s()
        records = {who_is(owner_of(record)): record for record in self._records()}
        events: list[Took | Freed] = [
            Freed(holding.owner, now_s)
            for who, holding in self._local.held.items()
            if who not in records
        ]
        for record in records.values():
            windows = [
                (address, self._window_of(address))
                for address in (record.address, record.address6)
                if address
            ]
            # The store may know it; it may be what was not told before the disk was lost.
            events += [
                Took(owner_of(record), window.pool, (address_text(address),), now_s)
                for address, window in windows
                if window is not None and (window.pool, address) not in self._local.used
            ]
        if events:
            log.warning("addresses.settled", count=len(events))
            await self._journal.append(*events)
            self._untold.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_windows())
            group.create_task(self._tell())

    async def _keep_windows(self) -> None:
        rounds = 0
        while True:
            self._hurry.clear()
            try:
                again = await self.sync()
                if rounds % INVENTORY_ROUNDS == 0:
                    await self.report()
                rounds += 1
                if again:
                    continue
            except TesseraError as error:
                log.debug("addresses.unsynced", error=str(error))
            await self._pause()

    async def _pause(self) -> None:
        """Until the next round, or until windows run low; but not at once again."""
        await self._clock.sleep(SYNC_PAUSE_S / 10)
        waited_s = 0.0
        while waited_s < SYNC_PAUSE_S and not self._hurry.is_set():
            await self._clock.sleep(SYNC_PAUSE_S / 10)
            waited_s += SYNC_PAUSE_S / 10

    async def sync(self, *, wishing: bool = True) -> bool:
        """One exchange about windows. True: the next is due at once."""
        local, now_s = self._local, self._clock.now_s()
        spare = local.surplus(self._empty_since, now_s)
        if spare is not None:
            await self._narrow(spare, 0)
        wishes = local.wishes(now_s) if wishing else []
        request = pb.SyncWindowsRequest(
            node=self._node,
            instance=self._journal.instance,
            networks=self._networks(),
            held=map(_to_wire, local.windows.values()),
            wanted=[pb.WindowWanted(pool=p, family=f) for p, f in wishes],
        )
        answer = await call(self._stub.SyncWindows, request, deadline_s=RPC_DEADLINE_S)
        first = not local.pools
        await self._hear(answer, now_s)
        for each in answer.gone:
            await self._drop(each)
        for each in answer.confirmed:
            if each.size == 0:
                await self._drop(each)
        for fresh in answer.given:
            await self._gain(fresh, now_s)
        narrowed = first and bool(local.wishes(now_s))
        for each in answer.recalled:
            known = local.windows.get((each.pool, parse_block(each.block)))
            if known is not None and known.generation == each.generation:
                size = min(known.size, local.narrowest(known, self._clock.now_s()))
                narrowed = narrowed or size < known.size
                await self._narrow(known, size)
        return narrowed

    async def report(self) -> None:
        held = [
            pb.Held(
                owner=convert.owner_to_wire(owner_of(record)),
                ips=[address_text(a) for a in (record.address, record.address6) if a],
            )
            for record in self._records()
        ]
        held += [
            pb.Held(
                owner=convert.owner_to_wire(holding.owner),
                ips=map(address_text, holding.addresses),
            )
            for holding in self._local.held.values()
        ]
        request = pb.ReportInventoryRequest(node=self._node, held=held)
        answer = await call(self._stub.ReportInventory, request, deadline_s=RPC_DEADLINE_S)
        if answer.released:
            log.warning("addresses.leaked", count=answer.released)

    async def tell(self) -> None:
        """One batch of what the store has yet to be told."""
        entries = self._local.pending[:BATCH]
        request = pb.ReplayRequest(node=self._node, entries=map(_entry, entries))
        answer = await call(self._stub.Replay, request, deadline_s=RPC_DEADLINE_S)
        for entry, result in zip(entries, answer.results, strict=True):
            ips = ",".join(map(address_text, entry.holding.addresses))
            if result.lost:
                self.lost[ips] = result.lost
                log.warning("address.lost", address=ips, reason=result.lost)
            else:
                self.lost.pop(ips, None)
        await self._journal.append(Told(len(entries)))

    # -------------------------------------------------------------- inside

    async def _tell(self) -> None:
        while True:
            await self._untold.wait()
            self._untold.clear()
            try:
                while self._local.pending:
                    await self.tell()
            except TesseraError as error:
                log.debug("addresses.untold", error=str(error))
                await self._clock.sleep(1.0)
                self._untold.set()

    async def _hear(self, answer: pb.SyncWindowsResponse, now_s: float) -> None:
        pools = {each.name: convert.spec_from_wire(each.spec) for each in answer.pools}
        heard = Heard(pools, answer.node_gone_s, answer.cooldown_s, now_s)
        before = self._local.heard
        if before is None or before.pools != pools or now_s - before.at >= HEARD_WRITTEN_S:
            await self._journal.append(heard)
        else:
            self._local.apply(heard)

    async def _narrow(self, window: Window, size: int) -> None:
        await self._journal.append(Narrowed(window.pool, str(window.block), size))

    async def _drop(self, window: pb.Window) -> None:
        known = self._local.windows.get((window.pool, parse_block(window.block)))
        if known is not None and known.generation == window.generation:
            await self._journal.append(Gone(window.pool, window.block))

    async def _gain(self, fresh: pb.GivenWindow, now_s: float) -> None:
        window = fresh.window
        if (window.pool, parse_block(window.block)) in self._local.windows:
            return
        taken = tuple((convert.owner_from_wire(row.owner), row.ip) for row in fresh.taken)
        await self._journal.append(
            Gained(
                window.pool,
                window.block,
                window.generation,
                window.size,
                taken,
                tuple(fresh.cooling),
                now_s,
            )
        )
        log.info("window.gained", block=window.block, pool=window.pool, count=window.size)
        if taken:
            await self.settle()

    def _window_of(self, address: int) -> Window | None:
        return next((w for w in self._local.windows.values() if address in w), None)


def owner_of(record: EndpointRecord) -> Owner:
    """`uid`: another for each time the endpoint is made."""
    return Owner(record.namespace, record.name, record.interface, f"{record.outer}.{record.id}")


def given(ips: Iterable[str]) -> Given:
    numbers = [ip_address(ip) for ip in ips]
    return Given(
        next((int(ip) for ip in numbers if ip.version == 4), 0),
        next((int(ip) for ip in numbers if ip.version == 6), 0),
    )


def _to_wire(window: Window) -> pb.Window:
    return pb.Window(
        pool=window.pool,
        block=str(window.block),
        generation=window.generation,
        size=window.size,
    )


def _entry(entry: Entry) -> pb.ReplayEntry:
    holding = entry.holding
    return pb.ReplayEntry(
        owner=convert.owner_to_wire(holding.owner),
        pool=holding.pool,
        addresses=map(address_text, holding.addresses),
        released=entry.released,
        at=entry.at,
    )
