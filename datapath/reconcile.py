"""Desired tables against actual ones: a pure `plan`, and `apply`, which owns the order of writes.

No order of writes below lets a packet meet half a policy:

    port and range rows of new classes     nobody refers to them yet
    peer rows                              of slots nobody uses, or single rows in place
    slot revisions                         cached verdicts are judged again, by the rows above
    endpoint rows                          the flip to another slot
    local4/6, ipcaches, prefixes           a new address gets its identity once peers know it;
                                           narrow prefixes before wide ones
    ---- removals, the other way round
    prefixes, ipcache, local4, endpoints   nobody arrives with the identity any more
    peer rows, revisions again             of slots nobody uses any more, or single rows in place
    range and port rows of dead classes

Peer rows travel as (slot, row, bitmap of identities) and are packed in bulk: ten thousand
identities cost one packed write, not ten thousand objects.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sized
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from pyroaring import BitMap

from datapath.maps.layout import (
    Endpoint,
    IpcacheEntry,
    LocalEndpoint,
    PolicyAnswer,
    PolicyPeer,
    PolicyPeerKey,
    PolicyPortKey,
    PolicyRangeKey,
    PolicySlot,
    Prefix4,
    Prefix6,
)
from datapath.maps.table import Table

K = TypeVar("K")
V = TypeVar("V")

PeerRows = Mapping[int, Mapping[PolicyPeer, BitMap]]
"""slot -> row -> the identities that have it; identity 0 is everyone else's row."""


class PolicyTables(Protocol):
    """The maps that desired state fills; what the programs write themselves is not among them."""

    @property
    def endpoints(self) -> Table[int, Endpoint]: ...
    @property
    def local4(self) -> Table[int, LocalEndpoint]: ...
    @property
    def ipcache4(self) -> Table[int, IpcacheEntry]: ...
    @property
    def ipcache4_prefix(self) -> Table[Prefix4, IpcacheEntry]: ...
    @property
    def local6(self) -> Table[int, LocalEndpoint]: ...
    @property
    def ipcache6(self) -> Table[int, IpcacheEntry]: ...
    @property
    def ipcache6_prefix(self) -> Table[Prefix6, IpcacheEntry]: ...
    @property
    def policy_slot(self) -> Table[int, PolicySlot]: ...
    @property
    def policy_peer(self) -> Table[PolicyPeerKey, PolicyPeer]: ...
    @property
    def policy_port(self) -> Table[PolicyPortKey, PolicyAnswer]: ...
    @property
    def policy_range(self) -> Table[PolicyRangeKey, PolicyAnswer]: ...


@dataclass(frozen=True, slots=True)
class Contents:
    """All rows but the slot revisions, which only ever count up. ipcache: address -> identity,
    above it (see `behind`) the node to send it to in a tunnel."""

    endpoints: Mapping[int, Endpoint] = field(default_factory=dict)
    local4: Mapping[int, LocalEndpoint] = field(default_factory=dict)
    ipcache: Mapping[int, int] = field(default_factory=dict)
    prefixes: Mapping[Prefix4, int] = field(default_factory=dict)
    local6: Mapping[int, LocalEndpoint] = field(default_factory=dict)
    ipcache6: Mapping[int, int] = field(default_factory=dict)
    prefixes6: Mapping[Prefix6, int] = field(default_factory=dict)
    peers: PeerRows = field(default_factory=dict)
    ports: Mapping[PolicyPortKey, PolicyAnswer] = field(default_factory=dict)
    ranges: Mapping[PolicyRangeKey, PolicyAnswer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PeerPut:
    slot: int
    row: PolicyPeer
    identities: BitMap


@dataclass(slots=True)
class Ops:
    """What to write, fields in the order of writing."""

    ports: dict[PolicyPortKey, PolicyAnswer] = field(default_factory=dict)
    ranges: dict[PolicyRangeKey, PolicyAnswer] = field(default_factory=dict)
    peers: list[PeerPut] = field(default_factory=list)
    revisions: dict[int, int] = field(default_factory=dict)
    endpoints: dict[int, Endpoint] = field(default_factory=dict)
    local4: dict[int, LocalEndpoint] = field(default_factory=dict)
    ipcache: dict[int, int] = field(default_factory=dict)
    prefixes: dict[Prefix4, int] = field(default_factory=dict)
    local6: dict[int, LocalEndpoint] = field(default_factory=dict)
    ipcache6: dict[int, int] = field(default_factory=dict)
    prefixes6: dict[Prefix6, int] = field(default_factory=dict)
    prefixes6_removed: list[Prefix6] = field(default_factory=list)
    ipcache6_removed: list[int] = field(default_factory=list)
    local6_removed: list[int] = field(default_factory=list)
    prefixes_removed: list[Prefix4] = field(default_factory=list)
    ipcache_removed: list[int] = field(default_factory=list)
    local4_removed: list[int] = field(default_factory=list)
    endpoints_removed: list[int] = field(default_factory=list)
    peers_removed: list[tuple[int, BitMap]] = field(default_factory=list)
    revisions_after: dict[int, int] = field(default_factory=dict)
    ranges_removed: list[PolicyRangeKey] = field(default_factory=list)
    ports_removed: list[PolicyPortKey] = field(default_factory=list)

    def rows(self) -> int:
        """How many rows are written or deleted, revisions aside."""
        plain: tuple[Sized, ...] = (
            self.ports,
            self.ranges,
            self.endpoints,
            self.local4,
            self.ipcache,
            self.prefixes,
            self.local6,
            self.ipcache6,
            self.prefixes6,
            self.prefixes6_removed,
            self.ipcache6_removed,
            self.local6_removed,
            self.prefixes_removed,
            self.ipcache_removed,
            self.local4_removed,
            self.endpoints_removed,
            self.ranges_removed,
            self.ports_removed,
        )
        peers = sum(len(put.identities) for put in self.peers)
        removed = sum(len(identities) for _, identities in self.peers_removed)
        return sum(len(rows) for rows in plain) + peers + removed


# ------------------------------------------------------------------ reading


def read(tables: PolicyTables) -> Contents:
    """One pass over every table; meant for start-up, when nobody else writes."""
    return Contents(
        endpoints=dict(tables.endpoints.items()),
        local4=dict(tables.local4.items()),
        ipcache=read_ipcache(tables),
        prefixes={prefix: entry.identity for prefix, entry in tables.ipcache4_prefix.items()},
        local6=dict(tables.local6.items()),
        ipcache6={
            address: behind(entry.identity, entry.tunnel)
            for address, entry in tables.ipcache6.items()
        },
        prefixes6={prefix: entry.identity for prefix, entry in tables.ipcache6_prefix.items()},
        peers=read_peers(tables),
        ports=dict(tables.policy_port.items()),
        ranges=dict(tables.policy_range.items()),
    )


_IDENTITY = 0xFFFFFFFF


def behind(identity: int, tunnel: int) -> int:
    """An address's row in one number, of which there may be a quarter of a million. `tunnel`: the
    node's IPv4 address; 0: the way there is a route."""
    return identity | tunnel << 32


def entry_of(value: int) -> IpcacheEntry:
    return IpcacheEntry(value & _IDENTITY, value >> 32)


def read_ipcache(tables: PolicyTables) -> dict[int, int]:
    """As Contents has it. A quarter of a million rows are read as columns, not as objects."""
    found: dict[int, int] = {}
    for keys, values, _ in tables.ipcache4.items_packed():
        addresses = array("I", keys)
        if _NATIVE_IS_LITTLE:
            addresses.byteswap()
        columns = array("I", values)
        identities, tunnels = columns[0::2], columns[1::2]
        if not any(tunnels):
            found.update(zip(addresses, identities, strict=True))
            continue
        if _NATIVE_IS_LITTLE:
            tunnels.byteswap()
        found.update(zip(addresses, map(behind, identities, tunnels), strict=True))
    return found


def read_peers(tables: PolicyTables) -> dict[int, dict[PolicyPeer, BitMap]]:
    """Of a million rows few differ in more than the identity: each kind is unpacked once."""
    kinds: dict[tuple[int, bytes], array[int]] = defaultdict(lambda: array("I"))
    size = PolicyPeer.LAYOUT.size
    for keys, values, count in tables.policy_peer.items_packed():
        numbers = array("I", keys)
        rows = (values[at : at + size] for at in range(0, count * size, size))
        for slot, identity, row in zip(numbers[0::2], numbers[1::2], rows, strict=True):
            kinds[slot, row].append(identity)
    found: dict[int, dict[PolicyPeer, BitMap]] = defaultdict(dict)
    for (slot, row), identities in kinds.items():
        found[slot][PolicyPeer.unpack(row)] = BitMap(identities)
    return dict(found)


# ------------------------------------------------------------------ planning


def plan(desired: Contents, actual: Contents, revisions: Mapping[int, int]) -> Ops:
    """`revisions`: of the slots in either. Afterwards the tables hold `desired`, and no verdict
    cached under a slot whose rows differed is believed."""
    ops = Ops()
    ops.ports, ops.ports_removed = _difference(desired.ports, actual.ports)
    ops.ranges, ops.ranges_removed = _difference(desired.ranges, actual.ranges)
    ops.endpoints, ops.endpoints_removed = _difference(desired.endpoints, actual.endpoints)
    ops.local4, ops.local4_removed = _difference(desired.local4, actual.local4)
    ops.ipcache, ops.ipcache_removed = _difference(desired.ipcache, actual.ipcache)
    ops.prefixes, ops.prefixes_removed = _difference(desired.prefixes, actual.prefixes)
    ops.local6, ops.local6_removed = _difference(desired.local6, actual.local6)
    ops.ipcache6, ops.ipcache6_removed = _difference(desired.ipcache6, actual.ipcache6)
    ops.prefixes6, ops.prefixes6_removed = _difference(desired.prefixes6, actual.prefixes6)
    reworked = {key.class_id for key in (*ops.ports, *ops.ports_removed)}
    reworked |= {key.class_id for key in (*ops.ranges, *ops.ranges_removed)}
    for slot, rows in desired.peers.items():
        old = actual.peers.get(slot, {})
        puts, removed = peer_difference(slot, rows, old)
        ops.peers.extend(puts)
        revision = revisions.get(slot, 0)
        if puts:
            revision += 1
            ops.revisions[slot] = revision
        if removed:
            ops.peers_removed.append((slot, removed))
        if removed or any(row.class_id in reworked for row in rows):
            ops.revisions_after[slot] = revision + 1
    for slot, rows in actual.peers.items():
        if slot not in desired.peers:
            ops.peers_removed.append((slot, union(rows.values())))
    return ops


def peer_difference(
    slot: int, new: Mapping[PolicyPeer, BitMap], old: Mapping[PolicyPeer, BitMap]
) -> tuple[list[PeerPut], BitMap]:
    """(rows to write, identities whose row goes away)."""
    puts = []
    for row, identities in new.items():
        held = old.get(row)
        missing = identities if held is None else identities - held
        if missing:
            puts.append(PeerPut(slot, row, missing))
    return puts, union(old.values()) - union(new.values())


def union(bitmaps: Iterable[BitMap]) -> BitMap:
    return BitMap.union(*found) if (found := list(bitmaps)) else BitMap()


def _difference(desired: Mapping[K, V], actual: Mapping[K, V]) -> tuple[dict[K, V], list[K]]:
    put = {key: value for key, value in desired.items() if actual.get(key) != value}
    return put, [key for key in actual if key not in desired]


# ------------------------------------------------------------------ applying


def apply(ops: Ops, tables: PolicyTables) -> None:
    """Raises `Exhausted` with everything before the full table written; `undo` is the caller's."""
    apply_additions(ops, tables)
    apply_removals(ops, tables)


def apply_additions(ops: Ops, tables: PolicyTables) -> None:
    _put(tables.policy_port, ops.ports)
    _put(tables.policy_range, ops.ranges)
    put_peers(tables, ops.peers)
    put_revisions(tables, ops.revisions)
    _put(tables.endpoints, ops.endpoints)
    _put(tables.local4, ops.local4)
    put_ipcache(tables, ops.ipcache)
    _put(
        tables.ipcache4_prefix,
        {prefix: IpcacheEntry(ops.prefixes[prefix]) for prefix in sorted(ops.prefixes)[::-1]},
    )
    _put(tables.local6, ops.local6)
    _put(tables.ipcache6, {key: entry_of(value) for key, value in ops.ipcache6.items()})
    _put(
        tables.ipcache6_prefix,
        {prefix: IpcacheEntry(ops.prefixes6[prefix]) for prefix in sorted(ops.prefixes6)[::-1]},
    )


def apply_removals(ops: Ops, tables: PolicyTables) -> None:
    _delete(tables.ipcache6_prefix, sorted(ops.prefixes6_removed))
    _delete(tables.ipcache6, ops.ipcache6_removed)
    _delete(tables.local6, ops.local6_removed)
    _delete(tables.ipcache4_prefix, sorted(ops.prefixes_removed))
    delete_ipcache(tables, ops.ipcache_removed)
    _delete(tables.local4, ops.local4_removed)
    _delete(tables.endpoints, ops.endpoints_removed)
    delete_peers(tables, ops.peers_removed)
    put_revisions(tables, ops.revisions_after)
    _delete(tables.policy_range, ops.ranges_removed)
    _delete(tables.policy_port, ops.ports_removed)


def put_peers(tables: PolicyTables, puts: Iterable[PeerPut]) -> None:
    keys, values = bytearray(), bytearray()
    count = 0
    for put in puts:
        size = len(put.identities)
        keys += _peer_keys(put.slot, put.identities)
        values += put.row.pack() * size
        count += size
    if count:
        tables.policy_peer.put_packed(bytes(keys), bytes(values), count)


def delete_peers(tables: PolicyTables, removed: Iterable[tuple[int, BitMap]]) -> None:
    for slot, identities in removed:
        if identities:
            tables.policy_peer.delete_packed(_peer_keys(slot, identities), len(identities))


def put_ipcache(tables: PolicyTables, rows: Mapping[int, int]) -> None:
    if rows:
        tunnels = array("I", (value >> 32 for value in rows.values()))
        if _NATIVE_IS_LITTLE:
            tunnels.byteswap()
        identities = array("I", (value & _IDENTITY for value in rows.values()))
        values = _interleave(identities, tunnels)
        tables.ipcache4.put_packed(_address_keys(rows), values, len(rows))


def delete_ipcache(tables: PolicyTables, addresses: Collection[int]) -> None:
    if addresses:
        tables.ipcache4.delete_packed(_address_keys(addresses), len(addresses))


def put_revisions(tables: PolicyTables, revisions: Mapping[int, int]) -> None:
    if revisions:
        tables.policy_slot.put_many(
            {slot: PolicySlot(revision & 0xFFFFFFFF) for slot, revision in revisions.items()}
        )


def _peer_keys(slot: int, identities: BitMap) -> bytes:
    return _interleave(array("I", [slot]) * len(identities), identities.to_array())


def _address_keys(addresses: Iterable[int]) -> bytes:
    keys = array("I", addresses)
    if _NATIVE_IS_LITTLE:
        keys.byteswap()  # addresses are big-endian in the map
    return keys.tobytes()


def _interleave(first: array[int], second: array[int]) -> bytes:
    both = array("I", bytes(8 * len(first)))
    both[0::2] = first
    both[1::2] = second
    return both.tobytes()


_NATIVE_IS_LITTLE = array("H", [1]).tobytes()[0] == 1


def _put(table: Table[K, V], rows: Mapping[K, V]) -> None:
    if rows:
        table.put_many(rows)


def _delete(table: Table[K, V], keys: list[K]) -> None:
    if keys:
        table.delete_many(keys)
