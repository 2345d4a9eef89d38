"""Address -> identity rows: what the stream says, minus what this node knows better.

Pure but for `surplus`, which looks at the tables. An address of a local endpoint or of the node
itself is never written or removed for the stream's sake.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from ipaddress import IPv4Address
from socket import inet_aton

from datapath.agent.view import Address, View, ViewChange
from datapath.maps.layout import Prefix4
from datapath.reconcile import Ops, PolicyTables, read_ipcache
from identity.numbers import NumericIdentity

HOST_IDENTITY = NumericIdentity(1)


class AddressRows:
    """`endpoints`: the addresses of the endpoints here. `own`: the node's, which are the host's.
    `doubted`: the tables hold what the stream has yet to confirm; `problem`: not all rows are in
    the tables, and which are not is not known one by one."""

    def __init__(
        self, view: View, own_nodes: frozenset[str], endpoints: Callable[[], Iterable[int]]
    ) -> None:
        self._view = view
        self._own_nodes = own_nodes
        self._endpoints = endpoints
        self.own: frozenset[int] = frozenset()
        self.doubted = False
        self.problem = ""

    def following(self, change: ViewChange, tables: PolicyTables) -> Ops:
        if self.doubted:
            self.doubted = False
            return surplus(tables, self.all(), self._local())
        if self.problem:
            self.problem = ""
            return self.all(change.addresses_removed)
        if not change.addresses_put and not change.addresses_removed:
            return Ops()
        return self._rows(change.addresses_put, (a.cidr for a in change.addresses_removed))

    def all(self, removed: Iterable[Address] = ()) -> Ops:
        return self._rows(self._view.addresses.values(), (address.cidr for address in removed))

    def given_back(self, addresses: Iterable[int]) -> Ops:
        """Of addresses that were this node's until now: what the stream says of them."""
        known = {cidr: self._view.addresses.get(cidr) for cidr in map(dotted, addresses)}
        return self._rows(
            (found for found in known.values() if found is not None),
            (cidr for cidr, found in known.items() if found is None),
        )

    def owning(self, addresses: Iterable[int]) -> Ops:
        now = frozenset(addresses)
        gone, self.own = self.own - now, now
        ops = self.given_back(gone)
        ops.ipcache |= dict.fromkeys(now, int(HOST_IDENTITY))
        return ops

    def _local(self) -> set[int]:
        return {*self.own, *self._endpoints()}

    def _rows(self, put: Iterable[Address], removed: Iterable[str]) -> Ops:
        return address_ops(put, removed, local=self._local(), own_nodes=self._own_nodes)


def address_ops(
    put: Iterable[Address],
    removed: Iterable[str],
    *,
    local: Collection[int],
    own_nodes: Collection[str],
) -> Ops:
    """`own_nodes`: the names of this node. What the stream says of its addresses is left out: the
    endpoints here are known first-hand, and an echo must not outlive them."""
    ops = Ops()
    for address in put:
        match parse_cidr(address.cidr):
            case int() as key if key not in local:
                if address.node and address.node in own_nodes:
                    ops.ipcache_removed.append(key)  # it may have been another node's before
                else:
                    ops.ipcache[key] = address.identity
            case Prefix4() as prefix:
                ops.prefixes[prefix] = address.identity
    for cidr in removed:
        match parse_cidr(cidr):
            case int() as key if key not in local:
                ops.ipcache_removed.append(key)
            case Prefix4() as prefix:
                ops.prefixes_removed.append(prefix)
    return ops


def surplus(tables: PolicyTables, wanted: Ops, local: Collection[int]) -> Ops:
    """`wanted`, plus the removal of every other row the tables hold."""
    wanted.ipcache_removed = [
        address
        for address in read_ipcache(tables)
        if address not in wanted.ipcache and address not in local
    ]
    wanted.prefixes_removed = [
        prefix for prefix, _ in tables.ipcache4_prefix.items() if prefix not in wanted.prefixes
    ]
    return wanted


def parse_cidr(text: str) -> int | Prefix4 | None:
    """An address as a number, a prefix with its host bits cleared; None: not IPv4."""
    address, _, bits = text.partition("/")
    try:
        number = int.from_bytes(inet_aton(address), "big")
    except OSError:
        return None
    if not bits:
        return number
    length = int(bits)
    return Prefix4(length, number >> 32 - length << 32 - length)


def dotted(address: int) -> str:
    return str(IPv4Address(address))
