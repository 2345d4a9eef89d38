"""Address -> identity rows: what the stream says, minus what this node knows better.

Pure but for `surplus`, which looks at the tables. An address of a local endpoint or of the node
itself is never written or removed for the stream's sake.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from ipaddress import IPv4Address
from socket import AF_INET, AF_INET6, inet_pton

from datapath.agent.view import Address, View, ViewChange
from datapath.maps.layout import Endpoint, LocalEndpoint, Prefix4, Prefix6, mapped, plain
from datapath.reconcile import Ops, PolicyTables, behind, read_ipcache
from identity.numbers import KUBE_APISERVER, REMOTE_NODE, NumericIdentity

HOST_IDENTITY = NumericIdentity(1)
Key = int
"""An address of either family in 128 bits, as layout.mapped spells it."""

_FOUR = mapped(IPv4Address(0)) >> 32
_LAST = 0xFFFFFFFF
_NO_TUNNELS: Mapping[str, int] = {}
NODES = frozenset({REMOTE_NODE, KUBE_APISERVER})
"""The identities of other nodes."""


class AddressRows:
    """`endpoints`: the addresses of the endpoints here; `own`: the node's, which are the host's; of
    both families, as Key. `tunnelled`: other nodes' endpoints are behind tunnels. `doubted`: the
    tables hold what the stream has yet to confirm; `problem`: not all rows are in the tables, and
    which are not is not known one by one."""

    def __init__(
        self,
        view: View,
        own_nodes: frozenset[str],
        endpoints: Callable[[], Iterable[Key]],
        *,
        tunnelled: bool = False,
    ) -> None:
        self._view = view
        self._tunnelled = tunnelled
        self._tunnels: dict[str, int] = {}
        self._own_nodes = own_nodes
        self._endpoints = endpoints
        self.own: frozenset[int] = frozenset()
        self.doubted = False
        self.problem = ""

    def following(self, change: ViewChange, tables: PolicyTables) -> Ops:
        moved = self._nodes_changed(change)
        if self.doubted:
            self.doubted = False
            return surplus(tables, self.all(), self._local())
        if self.problem or moved:
            self.problem = ""
            return self.all(change.addresses_removed)
        if not change.addresses_put and not change.addresses_removed:
            return Ops()
        return self._rows(change.addresses_put, (a.cidr for a in change.addresses_removed))

    def _nodes_changed(self, change: ViewChange) -> bool:
        """Whether tunnels lead elsewhere now; then every address is looked at again."""
        rows = (*change.addresses_put, *change.addresses_removed)
        if not self._tunnelled or not any(row.identity in NODES for row in rows):
            return False
        self._find_tunnels()
        return True

    def _find_tunnels(self) -> None:
        self._tunnels = {
            row.node: int(IPv4Address(row.cidr))
            for row in self._view.addresses.values()
            if row.identity in NODES and ":" not in row.cidr
        }

    def all(self, removed: Iterable[Address] = ()) -> Ops:
        if self._tunnelled:
            self._find_tunnels()
        return self._rows(self._view.addresses.values(), (address.cidr for address in removed))

    def given_back(self, addresses: Iterable[Key]) -> Ops:
        """Of addresses that were this node's until now: what the stream says of them."""
        known = {cidr: self._view.addresses.get(cidr) for cidr in map(spelled, addresses)}
        return self._rows(
            (found for found in known.values() if found is not None),
            (cidr for cidr, found in known.items() if found is None),
        )

    def owning(self, addresses: Iterable[Key]) -> Ops:
        now = frozenset(addresses)
        gone, self.own = self.own - now, now
        ops = self.given_back(gone)
        for key in now:
            note(ops, key, HOST_IDENTITY)
        return ops

    def _local(self) -> set[Key]:
        return {*self.own, *self._endpoints()}

    def _rows(self, put: Iterable[Address], removed: Iterable[str]) -> Ops:
        return address_ops(
            put,
            removed,
            local=self._local(),
            own_nodes=self._own_nodes,
            tunnels=self._tunnels,
        )


def address_ops(
    put: Iterable[Address],
    removed: Iterable[str],
    *,
    local: Collection[Key],
    own_nodes: Collection[str],
    tunnels: Mapping[str, int] = _NO_TUNNELS,
) -> Ops:
    """`tunnels`: node -> where its endpoints are sent to. `own_nodes`: the names of this node. What
    the stream says of its addresses is left out: the endpoints here are known first-hand, and an
    echo must not outlive them."""
    ops = Ops()
    for address in put:
        match parse_cidr(address.cidr):
            case int() as key if key not in local:
                if address.node and address.node in own_nodes:
                    drop(ops, key)  # it may have been another node's before
                else:
                    tunnel = 0 if address.identity in NODES else tunnels.get(address.node, 0)
                    note(ops, key, behind(address.identity, tunnel))
            case Prefix4() as prefix:
                ops.prefixes[prefix] = address.identity
            case Prefix6() as prefix6:
                ops.prefixes6[prefix6] = address.identity
    for cidr in removed:
        match parse_cidr(cidr):
            case int() as key if key not in local:
                drop(ops, key)
            case Prefix4() as prefix:
                ops.prefixes_removed.append(prefix)
            case Prefix6() as prefix6:
                ops.prefixes6_removed.append(prefix6)
    return ops


def note(ops: Ops, key: Key, identity: int) -> None:
    """The row of an address; in which table, its family says."""
    if key >> 32 == _FOUR:
        ops.ipcache[key & _LAST] = identity
    else:
        ops.ipcache6[key] = identity


def drop(ops: Ops, key: Key) -> None:
    if key >> 32 == _FOUR:
        ops.ipcache_removed.append(key & _LAST)
    else:
        ops.ipcache6_removed.append(key)


def keys_of(row: Endpoint) -> list[Key]:
    four = [row.ipv4 | _FOUR << 32] if row.ipv4 else []
    return [*four, row.ipv6] if row.ipv6 else four


def place(ops: Ops, ifindex: int, row: Endpoint) -> None:
    """What delivers packets to an endpoint and says who it is, for each address it has."""
    if row.ipv4:
        ops.local4[row.ipv4] = LocalEndpoint(ifindex)
        ops.ipcache[row.ipv4] = row.identity
    if row.ipv6:
        ops.local6[row.ipv6] = LocalEndpoint(ifindex)
        ops.ipcache6[row.ipv6] = row.identity


def keys4(addresses: Iterable[int]) -> Iterator[tuple[int, Key]]:
    for address in addresses:
        yield address, address | _FOUR << 32


def surplus(tables: PolicyTables, wanted: Ops, local: Collection[Key]) -> Ops:
    """`wanted`, plus the removal of every other row the tables hold."""
    wanted.ipcache_removed = [
        address
        for address, key in keys4(read_ipcache(tables))
        if address not in wanted.ipcache and key not in local
    ]
    wanted.ipcache6_removed = [
        address
        for address, _ in tables.ipcache6.items()
        if address not in wanted.ipcache6 and address not in local
    ]
    wanted.prefixes6_removed = [
        prefix for prefix, _ in tables.ipcache6_prefix.items() if prefix not in wanted.prefixes6
    ]
    wanted.prefixes_removed = [
        prefix for prefix, _ in tables.ipcache4_prefix.items() if prefix not in wanted.prefixes
    ]
    return wanted


def parse_cidr(text: str) -> Key | Prefix4 | Prefix6 | None:
    """An address, or a prefix with its host bits cleared; None: neither."""
    address, _, bits = text.partition("/")
    six = ":" in address
    try:
        number = int.from_bytes(inet_pton(AF_INET6 if six else AF_INET, address), "big")
    except OSError:
        return None
    if not bits:
        return number if six else number | _FOUR << 32
    length = int(bits)
    if six:
        return Prefix6(length, number >> 128 - length << 128 - length)
    return Prefix4(length, number >> 32 - length << 32 - length)


def spelled(key: Key) -> str:
    return str(plain(key))


def dotted(address: int) -> str:
    return str(IPv4Address(address))
