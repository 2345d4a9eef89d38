"""Desired rows against the kernel's, row by row, and mending what differs.

    Enforcement.desired ──┐
                          ├─► differences ──► report
    reconcile.read ◄── tables    └──► plan ──► apply, when asked to

The maps are read anew. Nothing else runs in between: one call sees one state, and what it calls
different was different. A million rows hold the loop for about a second; packets do not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address
from itertools import islice
from typing import Protocol, TypeVar

import msgspec

from datapath.agent.addresses import dotted
from datapath.maps.layout import (
    RANGE_FIXED_BITS,
    Endpoint,
    LocalEndpoint,
    PolicyAnswer,
    PolicyPeer,
    PolicyPortKey,
    PolicyRangeKey,
    Prefix4,
    Prefix6,
)
from datapath.reconcile import Contents, PeerRows, PolicyTables, apply, entry_of, plan, read
from services.flows.flow import protocol_name

# As many differences are told; all are counted, and mended.
TOLD = 1000

K = TypeVar("K")
V = TypeVar("V")


class Difference(msgspec.Struct, frozen=True):
    """`wanted`, `found`: empty where there is no row."""

    table: str
    key: str
    wanted: str
    found: str


class Report(msgspec.Struct, frozen=True):
    """`rows`: compared, in each table. `unconfirmed`: policyd has not spoken since the agent
    started, and addresses are taken to be right as they are."""

    rows: dict[str, int]
    different: int
    differences: list[Difference]
    repaired: bool
    unconfirmed: bool


class Enforced(Protocol):
    def desired(self, actual: Contents) -> Contents: ...
    @property
    def unconfirmed(self) -> bool: ...


class Programs(Protocol):
    def attached(self) -> set[str]: ...
    def attach(self, ifindex: int, ifname: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Verifier:
    """`interfaces`: ifindex -> host side of every endpoint that is judged."""

    tables: PolicyTables
    enforced: Enforced
    programs: Programs
    interfaces: Callable[[], Mapping[int, str]]

    def verify(self, *, repair: bool) -> Report:
        actual = read(self.tables)
        desired = self.enforced.desired(actual)
        found = list(differences(desired, actual))
        unjudged = self._unjudged()
        found += [
            Difference("programs", name, "judged in both directions", "not, or in one of them")
            for name in unjudged.values()
        ]
        if repair and found:
            self._mend(desired, actual)
            for index, name in unjudged.items():
                self.programs.attach(index, name)
        return Report(
            rows=_counts(desired),
            different=len(found),
            differences=list(islice(found, TOLD)),
            repaired=repair and bool(found),
            unconfirmed=self.enforced.unconfirmed,
        )

    def _unjudged(self) -> dict[int, str]:
        attached = self.programs.attached()
        return {i: name for i, name in self.interfaces().items() if name not in attached}

    def _mend(self, desired: Contents, actual: Contents) -> None:
        slots = desired.peers.keys() | actual.peers.keys()
        held = {slot: self.tables.policy_slot.get(slot) for slot in slots}
        revisions = {slot: row.revision if row else 0 for slot, row in held.items()}
        apply(plan(desired, actual, revisions), self.tables)


def _counts(contents: Contents) -> dict[str, int]:
    peers = sum(len(ids) for rows in contents.peers.values() for ids in rows.values())
    plain: dict[str, Collection[object]] = {
        "endpoints": contents.endpoints,
        "local4": contents.local4,
        "ipcache4": contents.ipcache,
        "ipcache4_prefix": contents.prefixes,
        "local6": contents.local6,
        "ipcache6": contents.ipcache6,
        "ipcache6_prefix": contents.prefixes6,
        "policy_port": contents.ports,
        "policy_range": contents.ranges,
    }
    return {name: len(rows) for name, rows in plain.items()} | {"policy_peer": peers}


def differences(desired: Contents, actual: Contents) -> Iterator[Difference]:
    yield from _between("endpoints", desired.endpoints, actual.endpoints, _ifindex, _endpoint)
    yield from _between("local4", desired.local4, actual.local4, dotted, _local)
    yield from _between("ipcache4", desired.ipcache, actual.ipcache, dotted, _identity)
    yield from _between("ipcache4_prefix", desired.prefixes, actual.prefixes, _prefix, _identity)
    yield from _between("local6", desired.local6, actual.local6, _six, _local)
    yield from _between("ipcache6", desired.ipcache6, actual.ipcache6, _six, _identity)
    yield from _between("ipcache6_prefix", desired.prefixes6, actual.prefixes6, _prefix6, _identity)
    yield from _peers(desired.peers, actual.peers)
    yield from _between("policy_port", desired.ports, actual.ports, _port, _answer)
    yield from _between("policy_range", desired.ranges, actual.ranges, _range, _answer)


def _between(
    table: str,
    desired: Mapping[K, V],
    actual: Mapping[K, V],
    key_text: Callable[[K], str],
    text: Callable[[V], str],
) -> Iterator[Difference]:
    for key in (*desired, *(key for key in actual if key not in desired)):
        wanted, found = desired.get(key), actual.get(key)
        if wanted != found:
            yield Difference(table, key_text(key), _told(wanted, text), _told(found, text))


def _told(value: V | None, text: Callable[[V], str]) -> str:
    return "" if value is None else text(value)


def _peers(desired: PeerRows, actual: PeerRows) -> Iterator[Difference]:
    """Bitmaps first: of a million equal rows none is spelled out."""
    for slot in sorted(desired.keys() | actual.keys()):
        wanted, found = desired.get(slot, {}), actual.get(slot, {})
        suspects = _suspects(wanted, found) | _suspects(found, wanted)
        if suspects:
            rows = _rows_of(wanted, suspects), _rows_of(found, suspects)
            yield from _between("policy_peer", *rows, f"slot {slot}, identity {{}}".format, _peer)


def _suspects(
    some: Mapping[PolicyPeer, Iterable[int]], others: Mapping[PolicyPeer, Iterable[int]]
) -> set[int]:
    found: set[int] = set()
    for row, identities in some.items():
        held = others.get(row)
        if held != identities:
            found |= set(identities) - set(held or ())
    return found


def _rows_of(
    rows: Mapping[PolicyPeer, Iterable[int]], identities: Collection[int]
) -> dict[int, PolicyPeer]:
    return {i: row for row, held in rows.items() for i in held if i in identities}


def _ifindex(index: int) -> str:
    return f"ifindex {index}"


def _identity(value: int) -> str:
    entry = entry_of(value)
    return f"identity {entry.identity}" + (f" at {dotted(entry.tunnel)}" if entry.tunnel else "")


def _prefix(prefix: Prefix4) -> str:
    return f"{dotted(prefix.addr)}/{prefix.prefixlen}"


def _prefix6(prefix: Prefix6) -> str:
    return f"{_six(prefix.addr)}/{prefix.prefixlen}"


def _six(address: int) -> str:
    return str(IPv6Address(address))


def _endpoint(row: Endpoint) -> str:
    slots = f"slots {row.slot_in} in, {row.slot_out} out"
    addresses = dotted(row.ipv4) + (f", {_six(row.ipv6)}" if row.ipv6 else "")
    return f"endpoint {row.id}, identity {row.identity}, {addresses}, {slots}"


def _peer(row: PolicyPeer) -> str:
    return f"{row.verdict.name.lower()} by rule {row.rule_id}, class {row.class_id}"


def _local(row: LocalEndpoint) -> str:
    return _ifindex(row.ifindex)


def _port(key: PolicyPortKey) -> str:
    return f"class {key.class_id}, {protocol_name(key.proto)} {key.dport}"


def _range(key: PolicyRangeKey) -> str:
    bits = key.prefixlen - RANGE_FIXED_BITS
    return f"class {key.class_id}, {protocol_name(key.proto)} {key.dport}/{bits}"


def _answer(row: PolicyAnswer) -> str:
    return f"{row.verdict.name.lower()} by rule {row.rule_id}"
