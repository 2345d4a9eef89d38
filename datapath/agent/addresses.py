"""Address -> identity rows: what the stream says, minus what this node knows better.

Pure but for `surplus`, which looks at the tables. An address of a local endpoint or of the node
itself is never written or removed here; its owner does that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from ipaddress import IPv4Address
from socket import inet_aton

from datapath.agent.view import Address
from datapath.maps.layout import Prefix4
from datapath.reconcile import Ops, PolicyTables, read_ipcache


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
