"""The kernel as endpoints.py sees it: interfaces, programs and tracked flows. Every call blocks."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address

from datapath import links
from datapath.agent.record import EndpointRecord
from datapath.links import VethInfo
from datapath.loader import Datapath
from datapath.maps.conntrack import forget_address


@dataclass(frozen=True, slots=True)
class NodeMachine:
    datapath: Datapath

    def netns_exists(self, netns: str) -> bool:
        return links.netns_exists(netns)

    def create_veth(self, record: EndpointRecord, address: IPv4Address) -> VethInfo:
        return links.create_veth(
            record.netns,
            record.interface,
            record.outer,
            address,
            mtu=record.mtu or links.MTU,
            routes=record.routes or (links.DEFAULT_ROUTE,),
        )

    def attach(self, ifindex: int, outer: str) -> None:
        self.datapath.attach(ifindex, outer)

    def set_up(self, outer: str, address: IPv4Address, mac: bytes) -> None:
        links.set_up(outer, address, mac)

    def delete_veth(self, outer: str) -> bool:
        return links.delete_veth(outer)

    def detach(self, outer: str) -> None:
        self.datapath.detach(outer)

    def forget_flows(self, address: int) -> int:
        return forget_address(self.datapath.tables.ct4, address)
