"""The way to endpoints of other nodes: one route per address, through the node that has it.

    stream's addresses ──► Ways (pure: address -> gateway) ──► differences ──► Router (kernel)
       10.244.3.7 at node b        b is 192.0.2.12              one batch per pause, in a thread

An address gets its identity before its route and loses it after, so that what arrives over the
route is judged as who it is. Routes of an earlier run stay until the stream has spoken; then those
nobody wants go. What the kernel refuses (the other node is not on a link of this one) is said once
per node and tried again.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from ipaddress import IPv4Address, ip_address
from typing import Final, Protocol

from datapath.agent.addresses import NODES
from datapath.agent.view import Address, View, ViewChange
from datapath.maps.layout import Node
from datapath.maps.table import Table
from services.runtime.clock import Clock
from services.runtime.log import logger

log = logger(__name__)

GATHER_S: Final = 0.02
RETRY_S: Final = 10.0


class Ways:
    """`own_nodes`: names of this node. `here`: whether an address is this machine's own.
    `tunnelled`: a node is reached by its IPv4 address, whatever is sent to it."""

    def __init__(
        self,
        view: View,
        own_nodes: Collection[str],
        here: Callable[[str], bool],
        *,
        tunnelled: bool = False,
    ) -> None:
        self._view = view
        self._tunnelled = tunnelled
        self._own_nodes = frozenset(own_nodes)
        self._here = here
        self._known: dict[str, Address] = {}
        self._at: defaultdict[str, set[str]] = defaultdict(set)
        self._node_ips: defaultdict[str, set[str]] = defaultdict(set)

    def learn(self, cidrs: Iterable[str]) -> set[str]:
        """Looks these up in the view again; the addresses whose way may be another now."""
        touched = set()
        for cidr in cidrs:
            before, now = self._known.pop(cidr, None), self._view.addresses.get(cidr)
            if before is not None:
                self._forget(before)
            if now is not None and now.node and "/" not in cidr:
                self._known[cidr] = now
                self._remember(now)
            touched.add(cidr)
            for row in (before, now):
                if row is not None and row.identity in NODES:
                    touched |= self._at[row.node]
        return touched

    def gateway(self, cidr: str) -> str | None:
        """None: it is no endpoint of another node, or that node's address is not known."""
        row = self._known.get(cidr)
        if row is None or row.identity in NODES or row.node in self._own_nodes:
            return None
        version = 4 if self._tunnelled else ip_address(cidr).version
        # A node that nobody named yet goes by its address.
        for ip in sorted(self._node_ips.get(row.node) or {row.node}):
            if _version(ip) == version and not self._here(ip):
                return ip
        return None

    def _remember(self, row: Address) -> None:
        (self._node_ips if row.identity in NODES else self._at)[row.node].add(row.cidr)

    def _forget(self, row: Address) -> None:
        index = self._node_ips if row.identity in NODES else self._at
        index[row.node].discard(row.cidr)
        if not index[row.node]:
            del index[row.node]


def _version(ip: str) -> int:
    """0: no address."""
    try:
        return ip_address(ip).version
    except ValueError:
        return 0


class Routes(Protocol):
    def held(self) -> dict[str, str]: ...
    def put(self, routes: Mapping[str, str]) -> dict[str, str]: ...
    def drop(self, destinations: Iterable[str]) -> None: ...


class Remote:
    """`refused`: address -> why the kernel did not take its route."""

    def __init__(self, ways: Ways, view: View, routes: Routes, clock: Clock) -> None:
        self._ways = ways
        self._view = view
        self._routes = routes
        self._clock = clock
        self._touched: set[str] = set()
        self._held: dict[str, str] = {}
        self._wake = asyncio.Event()
        self.refused: dict[str, str] = {}

    @property
    def count(self) -> int:
        return len(self._held)

    def follow(self, change: ViewChange) -> None:
        """Call when `change` is in the tables."""
        self._touched.update(address.cidr for address in change.addresses_put)
        self._touched.update(address.cidr for address in change.addresses_removed)
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        await self._wake.wait()
        self._held = await asyncio.to_thread(self._routes.held)
        self._touched |= {*self._view.addresses, *self._held}
        again_s = self._clock.monotonic_s() + RETRY_S
        while True:
            self._wake.clear()
            touched, self._touched = self._ways.learn(self._touched), set()
            await self._apply(touched)
            try:
                async with asyncio.timeout(RETRY_S if self.refused else None):
                    await self._wake.wait()
                await self._clock.sleep(GATHER_S)
            except TimeoutError:
                pass
            if self._clock.monotonic_s() >= again_s:
                self._touched.update(self.refused)
                again_s = self._clock.monotonic_s() + RETRY_S

    async def _apply(self, touched: Collection[str]) -> None:
        wanted = {cidr: self._ways.gateway(cidr) for cidr in touched}
        put = {cidr: way for cidr, way in wanted.items() if way and self._held.get(cidr) != way}
        gone = [cidr for cidr, way in wanted.items() if way is None and cidr in self._held]
        refused = await asyncio.to_thread(self._write, put, gone)
        self._tell(put, refused)
        self._held.update({cidr: way for cidr, way in put.items() if cidr not in refused})
        for cidr in gone:
            del self._held[cidr]
        for cidr in touched:
            self.refused.pop(cidr, None)
        self.refused.update(refused)

    def _write(self, put: Mapping[str, str], gone: Collection[str]) -> dict[str, str]:
        refused = self._routes.put(put) if put else {}
        if gone:
            self._routes.drop(gone)
        return refused

    def _tell(self, put: Mapping[str, str], refused: Mapping[str, str]) -> None:
        if fresh := {put[cidr] for cidr in refused if cidr not in self.refused}:
            cidr = next(one for one in refused if one not in self.refused)
            log.warning(
                "routes.refused",
                count=len(refused),
                address=", ".join(sorted(fresh)),
                reason=f"{refused[cidr]}; nodes must share a link for agent.routing = direct",
            )


class Peers:
    """The nodes whose tunnels are believed: the `nodes` table follows the stream."""

    def __init__(self, view: View, table: Table[int, Node], here: Collection[str]) -> None:
        self._view = view
        self._table = table
        self._here = frozenset(here)
        self._known = False

    def follow(self, change: ViewChange) -> None:
        rows = (*change.addresses_put, *change.addresses_removed)
        if self._known and not any(row.identity in NODES for row in rows):
            return
        self._known = True
        wanted = {
            int(IPv4Address(row.cidr)): Node(row.identity)
            for row in self._view.addresses.values()
            if row.identity in NODES and ":" not in row.cidr and row.cidr not in self._here
        }
        held = dict(self._table.items())
        self._table.put_many({ip: row for ip, row in wanted.items() if held.get(ip) != row})
        self._table.delete_many([ip for ip in held if ip not in wanted])
