"""Networks that are somebody else's: the nodes' own, and other clusters' address ranges.

Other clusters' are read where the mesh mirrors their nodes, in the format of Cilium's cluster mesh:
cilium/cache/nodes/v1/<cluster>/<node>, IPv4AllocCIDR and IPv6AllocCIDR being Go's net.IPNet.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

import msgspec

from ipam.block import Network
from ipam.keys import NODES, NodeRecord, parse_node_key
from ipam.pool import Pool
from services.store.model import KeyValue, Store

REMOTE_NODES = "cilium/cache/nodes/v1/"


@dataclass(frozen=True, slots=True)
class Foreign:
    network: Network
    whose: str


class _IpNet(msgspec.Struct, frozen=True):
    IP: str
    Mask: str


class _RemoteNode(msgspec.Struct, frozen=True):
    IPv4AllocCIDR: _IpNet | None = None
    IPv4SecondaryAllocCIDRs: list[_IpNet] | None = None
    IPv6AllocCIDR: _IpNet | None = None
    IPv6SecondaryAllocCIDRs: list[_IpNet] | None = None


async def networks(store: Store) -> list[Foreign]:
    nodes, remote = await store.list(NODES), await store.list(REMOTE_NODES)
    found = [each for kv in nodes.items for each in _own(kv)]
    return found + [each for kv in remote.items for each in _remote(kv)]


def overlap(pool: Pool, foreign: list[Foreign]) -> str | None:
    """What collides, in words; None when nothing does."""
    for mine, theirs in itertools.product(pool.cidrs, foreign):
        if mine.overlaps(theirs.network):
            return (
                f"pool {pool.name}: {mine} overlaps {theirs.network} of {theirs.whose};"
                " packets to it would not reach an endpoint"
            )
    return None


def _own(kv: KeyValue) -> Iterator[Foreign]:
    record = msgspec.json.decode(kv.value, type=NodeRecord)
    for text in record.networks:
        yield Foreign(ip_network(text), f"node {parse_node_key(kv.key)}")


def _remote(kv: KeyValue) -> Iterator[Foreign]:
    """A value that is no node names no network; the mesh reports it, not we."""
    cluster = kv.key.removeprefix(REMOTE_NODES).partition("/")[0]
    try:
        node = msgspec.json.decode(kv.value, type=_RemoteNode)
    except msgspec.DecodeError:
        return
    ranges = [node.IPv4AllocCIDR, node.IPv6AllocCIDR]
    ranges += [*(node.IPv4SecondaryAllocCIDRs or ()), *(node.IPv6SecondaryAllocCIDRs or ())]
    for each in ranges:
        network = _network(each) if each is not None else None
        if network is not None:
            yield Foreign(network, f"cluster {cluster}")


def _network(net: _IpNet) -> Network | None:
    try:
        length = int.from_bytes(base64.b64decode(net.Mask, validate=True), "big").bit_count()
        return ip_network(f"{ip_address(net.IP)}/{length}", strict=False)
    except (ValueError, binascii.Error):
        return None
