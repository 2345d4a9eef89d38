"""The pinned maps of a node as rows for readers. Reads, and flushes; needs no agent.

A map changes while it is read: a row may be missed or come twice, as with any walk of a live map.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from pyroaring import BitMap

from datapath.inspection.choice import Choice
from datapath.inspection.rows import (
    ConnectionRow,
    EndpointRow,
    IpcacheRow,
    JudgeRow,
    MapRow,
    MetricRow,
    PolicyRow,
)
from datapath.maps.flows import CtEntry, CtFlags, CtKey, CtSide
from datapath.maps.layout import (
    METRIC_LOST,
    RANGE_FIXED_BITS,
    Endpoint,
    EndpointFlags,
    IpcacheEntry,
    Metric,
    PolicyAnswer,
    PolicyPeer,
    PolicyRangeKey,
    Verdict,
    plain,
)
from datapath.maps.table import Table
from datapath.maps.tables import Tables
from datapath.reconcile import read_peers
from services.flows.flow import drop_reason_text, protocol_name

_EVERYONE = 0
_LAST_PORT = 65535
_DIRECTIONS = ("ingress", "egress")


# ------------------------------------------------------------------ endpoints, addresses


def endpoints(tables: Tables, choice: Choice) -> Iterator[EndpointRow]:
    names = dict(socket.if_nameindex())
    rows = (_endpoint(index, row, names) for index, row in tables.endpoints.items())
    yield from sorted(filter(choice.takes_endpoint, rows), key=lambda row: row.id)


def _endpoint(index: int, row: Endpoint, names: dict[int, str]) -> EndpointRow:
    return EndpointRow(
        id=row.id,
        interface=names.get(index, ""),
        ifindex=index,
        address=str(IPv4Address(row.ipv4)),
        address6=str(IPv6Address(row.ipv6)) if row.ipv6 else "",
        identity=row.identity,
        slot_in=row.slot_in,
        slot_out=row.slot_out,
        flags=_flags(EndpointFlags, row.flags),
        mac=row.mac.hex(":"),
        host_mac=row.host_mac.hex(":"),
    )


def addresses(tables: Tables, choice: Choice) -> Iterator[IpcacheRow]:
    """Of each family exact addresses, then prefixes, the narrow ones first."""
    exact = (
        IpcacheRow(str(IPv4Address(address)), entry.identity, _tunnel(entry))
        for address, entry in sorted(tables.ipcache4.items(), key=lambda item: item[0])
    )
    yield from filter(choice.takes_address, exact)
    prefixes = (
        IpcacheRow(
            f"{IPv4Address(prefix.addr)}/{prefix.prefixlen}",
            entry.identity,
            _tunnel(entry),
        )
        for prefix, entry in sorted(
            tables.ipcache4_prefix.items(), key=lambda item: (-item[0].prefixlen, item[0].addr)
        )
    )
    yield from filter(choice.takes_address, prefixes)
    exact6 = (
        IpcacheRow(str(IPv6Address(address)), entry.identity, _tunnel(entry))
        for address, entry in sorted(tables.ipcache6.items(), key=lambda item: item[0])
    )
    yield from filter(choice.takes_address, exact6)
    prefixes6 = (
        IpcacheRow(f"{IPv6Address(prefix.addr)}/{prefix.prefixlen}", entry.identity, _tunnel(entry))
        for prefix, entry in sorted(
            tables.ipcache6_prefix.items(), key=lambda item: (-item[0].prefixlen, item[0].addr)
        )
    )
    yield from filter(choice.takes_address, prefixes6)


def _tunnel(entry: IpcacheEntry) -> str:
    return str(IPv4Address(entry.tunnel)) if entry.tunnel else ""


# ------------------------------------------------------------------ policy


@dataclass(frozen=True, slots=True)
class _Slot:
    """What all rows of one slot have in common."""

    number: int
    direction: str
    endpoints: tuple[int, ...]
    revision: int

    def row(
        self,
        peers: tuple[int, ...],
        class_id: int,
        ports: tuple[str, str],
        answer: PolicyAnswer | PolicyPeer,
    ) -> PolicyRow:
        proto, which = ports
        return PolicyRow(
            slot=self.number,
            direction=self.direction,
            endpoints=self.endpoints,
            peers=peers,
            proto=proto,
            ports=which,
            verdict=answer.verdict.name.lower(),
            rule=answer.rule_id,
            proxy_port=answer.proxy_port,
            class_id=class_id,
            revision=self.revision,
        )


def policy(tables: Tables, choice: Choice) -> Iterator[PolicyRow]:
    """Slot by slot. Peers that share an answer share a row."""
    users = _users(tables)
    classes = _classes(tables)
    for number, answers in sorted(read_peers(tables).items()):
        held = tables.policy_slot.get(number)
        slot = _Slot(number, *users.get(number, ("", ())), held.revision if held else 0)
        for peer, identities in sorted(answers.items(), key=_lowest):
            for who in _split(identities):
                rows = (
                    slot.row(who, peer.class_id, ports, answer)
                    for ports, answer in (*classes.get(peer.class_id, ()), (("any", "any"), peer))
                )
                yield from filter(choice.takes_policy, rows)


def _lowest(answer: tuple[PolicyPeer, BitMap]) -> int:
    lowest: int = answer[1].min()
    return lowest


def _split(identities: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """Everyone's row apart from those of named peers."""
    found = tuple(identities)
    if found[0] == _EVERYONE:
        yield ()
        found = found[1:]
    if found:
        yield found


def _users(tables: Tables) -> dict[int, tuple[str, tuple[int, ...]]]:
    found: defaultdict[int, list[tuple[str, int]]] = defaultdict(list)
    for _, row in tables.endpoints.items():
        for direction, slot in zip(_DIRECTIONS, (row.slot_in, row.slot_out), strict=True):
            found[slot].append((direction, row.id))
    return {
        slot: (rows[0][0], tuple(sorted(number for _, number in rows)))
        for slot, rows in found.items()
    }


def _classes(tables: Tables) -> dict[int, list[tuple[tuple[str, str], PolicyAnswer]]]:
    """The port rows of every class, single ports first."""
    found: defaultdict[int, list[tuple[tuple[str, str], PolicyAnswer]]] = defaultdict(list)
    for key, answer in sorted(tables.policy_port.items(), key=lambda item: item[0]):
        spelled = (protocol_name(key.proto), str(key.dport))
        found[key.class_id].append((spelled, answer))
    for block, answer in sorted(tables.policy_range.items(), key=lambda item: item[0]):
        found[block.class_id].append(((protocol_name(block.proto), _span(block)), answer))
    return found


def _span(key: PolicyRangeKey) -> str:
    last = key.dport + (1 << 16 - (key.prefixlen - RANGE_FIXED_BITS)) - 1
    return "any" if (key.dport, last) == (0, _LAST_PORT) else f"{key.dport}-{last}"


# ------------------------------------------------------------------ connections


def connections(tables: Tables, choice: Choice, now_ns: int) -> Iterator[ConnectionRow]:
    """`now_ns`: CLOCK_MONOTONIC, which the entries are stamped with."""
    for key, entry in tables.ct.items():
        row = connection(key, entry, now_ns)
        if choice.takes_connection(row):
            yield row


def connection(key: CtKey, entry: CtEntry, now_ns: int) -> ConnectionRow:
    began, other = (1, 0) if entry.flags & CtFlags.INITIATOR_1 else (0, 1)
    return ConnectionRow(
        proto=protocol_name(key.proto),
        source=str(plain(key.addr[began])),
        source_port=key.port[began],
        destination=str(plain(key.addr[other])),
        destination_port=key.port[other],
        source_identity=entry.src_identity,
        destination_identity=entry.dst_identity,
        state=_flags(CtFlags, entry.flags & ~CtFlags.INITIATOR_1),
        packets=entry.packets,
        octets=entry.octets,
        idle_s=round(max(0, now_ns - entry.last_seen_ns) / 1e9, 3),
        ingress=_judge(entry.ingress),
        egress=_judge(entry.egress),
    )


def _judge(side: CtSide) -> JudgeRow | None:
    if side.verdict is Verdict.NONE:
        return None
    return JudgeRow(
        side.verdict.name.lower(), side.rule_id, side.slot, side.revision, side.proxy_port
    )


def flush(tables: Tables, choice: Choice, now_ns: int) -> int:
    """Forgets the chosen connections; how many. Their next packets are judged anew."""
    gone = [
        key
        for key, entry in tables.ct.items()
        if choice.takes_connection(connection(key, entry, now_ns))
    ]
    return tables.ct.delete_many(gone)


# ------------------------------------------------------------------ counters, sizes


def metrics(tables: Tables, choice: Choice) -> Iterator[MetricRow]:
    """Reasons that were counted at least once; forwarded first."""
    for key, metric in sorted(tables.metrics.items()):
        row = _metric(key, metric)
        if metric.packets and choice.takes_metric(row):
            yield row


def _metric(key: int, metric: Metric) -> MetricRow:
    if key == METRIC_LOST:
        return MetricRow(0, "EVENTS_LOST", "", metric.packets, metric.octets)
    reason, direction = divmod(key, 2)
    name = drop_reason_text(reason) or "FORWARDED"
    return MetricRow(reason, name, _DIRECTIONS[direction], metric.packets, metric.octets)


def maps(tables: Tables) -> Iterator[MapRow]:
    every: tuple[Table[object, object], ...] = tuple(
        getattr(tables, name) for name in tables.__dataclass_fields__
    )
    for table in every:
        if table.max_entries > 1 and table.name not in ("metrics", "policy_slot"):
            count = table.count()
            yield MapRow(table.name, count, table.max_entries, count / table.max_entries)


def _flags(kind: type[EndpointFlags] | type[CtFlags], value: int) -> tuple[str, ...]:
    return tuple((one.name or "").lower() for one in kind if value & one)
