"""Whether the tables of a node agree with each other and with what is attached: what can be said
without knowing which policy is wanted.

    endpoint ──► interface that exists, judged in both directions
             ──► local4 row back to it, identity of its address
             ──► slot ──► row for everyone ──► class ──► port rows
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterator, Mapping
from ipaddress import IPv4Address

from datapath.inspection.rows import FindingRow
from datapath.maps.layout import HOST_IFINDEX, SLOT_OPEN, Endpoint, PeerFlags, PolicyPeer
from datapath.maps.tables import Tables
from datapath.reconcile import PeerRows, entry_of, read_ipcache, read_peers


def findings(tables: Tables, attached: Collection[str]) -> Iterator[FindingRow]:
    """`attached`: interfaces that are judged in both directions."""
    endpoints = dict(tables.endpoints.items())
    yield from _interfaces(endpoints, attached)
    yield from _addresses(endpoints, tables)
    peers = read_peers(tables)
    yield from _slots(endpoints, peers)
    yield from _classes(peers, tables)


def _interfaces(
    endpoints: Mapping[int, Endpoint], attached: Collection[str]
) -> Iterator[FindingRow]:
    names = dict(socket.if_nameindex())
    for index, row in endpoints.items():
        if index == HOST_IFINDEX:
            continue  # the node itself, which has no interface of its own
        key = f"endpoint {row.id}, ifindex {index}"
        if index not in names:
            yield FindingRow("endpoints", key, "an interface", "none with that index")
        elif names[index] not in attached:
            yield FindingRow(
                "programs", names[index], "judged in both directions", "not, or in one of them"
            )


def _addresses(endpoints: Mapping[int, Endpoint], tables: Tables) -> Iterator[FindingRow]:
    local = {address: row.ifindex for address, row in tables.local4.items()}
    identities = {address: entry_of(v).identity for address, v in read_ipcache(tables).items()}
    for index, row in endpoints.items():
        if index == HOST_IFINDEX:
            continue
        address = str(IPv4Address(row.ipv4))
        if local.get(row.ipv4) != index:
            found = local.get(row.ipv4)
            yield FindingRow("local4", address, f"ifindex {index}", _said("ifindex", found))
        if identities.get(row.ipv4) != row.identity:
            found = identities.get(row.ipv4)
            yield FindingRow(
                "ipcache4", address, f"identity {row.identity}", _said("identity", found)
            )
    for number, ifindex in local.items():
        if ifindex not in endpoints:
            yield FindingRow("local4", str(IPv4Address(number)), "", f"ifindex {ifindex}")


def _said(word: str, number: int | None) -> str:
    return "" if number is None else f"{word} {number}"


def _slots(endpoints: Mapping[int, Endpoint], peers: PeerRows) -> Iterator[FindingRow]:
    used = {slot for row in endpoints.values() for slot in (row.slot_in, row.slot_out)}
    for slot in sorted(used - {SLOT_OPEN}):
        if not any(0 in identities for identities in peers.get(slot, {}).values()):
            yield FindingRow("policy_peer", f"slot {slot}", "a row for everyone", "")
    for slot in sorted(peers.keys() - used):
        count = sum(map(len, peers[slot].values()))
        yield FindingRow("policy_peer", f"slot {slot}", "", f"{count} rows nobody is judged by")


def _classes(peers: PeerRows, tables: Tables) -> Iterator[FindingRow]:
    ports = {key.class_id for key, _ in tables.policy_port.items()}
    ranges = {key.class_id for key, _ in tables.policy_range.items()}
    named: set[PolicyPeer] = {peer for rows in peers.values() for peer in rows}
    for peer in sorted(named, key=lambda row: row.class_id):
        key = f"class {peer.class_id}"
        if peer.flags & PeerFlags.HAS_PORTS and peer.class_id not in ports:
            yield FindingRow("policy_port", key, "the rows a peer row names", "")
        if peer.flags & PeerFlags.HAS_RANGES and peer.class_id not in ranges:
            yield FindingRow("policy_range", key, "the rows a peer row names", "")
    used = {peer.class_id for peer in named}
    for table, classes in (("policy_port", ports), ("policy_range", ranges)):
        for number in sorted(classes - used):
            yield FindingRow(table, f"class {number}", "", "rows no peer row names")
