"""The node's own devices: what leads out, and the overlay between nodes.

    endpoint ──► from_endpoint ──► overlay device ──► UDP to the other node      routing = overlay
                        └────────► stack ──► device ──► network                  otherwise

`prepare` makes the overlay device, before the programs are exchanged; `attach` hangs the programs
on both. The device stays when the agent ends, as everything that packets need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from ipaddress import IPv4Address
from typing import Final

from datapath import links
from datapath.attachments import Role
from datapath.loader import Datapath
from datapath.maps.layout import ConfigFlags, NodeConfig
from services.runtime.config import AgentConfig
from services.runtime.errors import Unusable

# VXLAN over IPv4: outer IP 20, UDP 8, VXLAN 8, inner Ethernet 14 (RFC 7348, section 5).
OVERHEAD: Final = 50
# Kept from the node's own sockets; twice what one peer and port can have at once in a minute.
NAT_PORTS: Final = (50000, 60999)


@dataclass(frozen=True, slots=True)
class Underlay:
    """`overlay`: ifindex, 0 without one. `mtu`: of endpoints."""

    overlay: int
    devices: Mapping[str, int]
    settings: NodeConfig
    mtu: int


def roles(config: AgentConfig) -> frozenset[Role]:
    wanted: set[Role] = {"endpoint"}
    if config.masquerade or config.host_firewall:
        wanted.add("netdev")
    if config.routing == "overlay":
        wanted |= {"overlay", "netdev"}
    return frozenset(wanted)


def overlay_name(node: str) -> str:
    """Of the same node the same again."""
    return "tvx" + blake2b(node.encode(), digest_size=5).hexdigest()


def prepare(config: AgentConfig, node_ip: str) -> Underlay:
    """Blocks. Raises `Unusable`."""
    devices = {}
    mtu = links.MTU
    if "netdev" in roles(config):
        for name in config.devices or links.devices_with(IPv4Address(node_ip)):
            devices[name] = links.ifindex_of(name)
            if not devices[name]:
                raise Unusable(f"no interface {name}, which [agent] devices names")
        if not devices:
            raise Unusable(f"no interface has {node_ip}: set [agent] devices to what leads out")
        mtu = min(map(links.mtu_of, devices))
    overlay = 0
    if config.routing == "overlay":
        mtu -= OVERHEAD
        overlay = links.ensure_overlay(overlay_name(config.node_name), config.tunnel_port, mtu)
    if config.masquerade:
        links.reserve_ports(*NAT_PORTS)
    flags = ConfigFlags.MASQUERADE if config.masquerade else ConfigFlags(0)
    first, last = NAT_PORTS if config.masquerade else (0, 0)
    settings = NodeConfig(
        flags,
        int(IPv4Address(node_ip)),
        overlay,
        config.tunnel_port if overlay else 0,
        first,
        last,
    )
    return Underlay(overlay, devices, settings, mtu)


def attach(loaded: Datapath, underlay: Underlay, node: str) -> None:
    """Idempotent; after the tables are in order."""
    for name, index in underlay.devices.items():
        loaded.attach(index, name, "netdev")
    if underlay.overlay:
        loaded.attach(underlay.overlay, overlay_name(node), "overlay")
