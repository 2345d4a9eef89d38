"""The kernel as endpoints.py sees it: interfaces, programs and tracked flows. Every call blocks."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from datapath import links
from datapath.agent.record import EndpointRecord
from datapath.cni.result import Seen
from datapath.links import VethInfo
from datapath.loader import Datapath
from datapath.maps.conntrack import forget_address
from datapath.maps.layout import mapped


@dataclass(frozen=True, slots=True)
class NodeMachine:
    """`mtu`: of endpoints that ask for none."""

    datapath: Datapath
    mtu: int = links.MTU

    def netns_exists(self, netns: str) -> bool:
        return links.netns_exists(netns)

    def create_veth(self, record: EndpointRecord, address: IPv4Address) -> VethInfo:
        return links.create_veth(
            record.netns,
            record.interface,
            record.outer,
            address,
            address6=_six(record),
            mtu=record.mtu or self.mtu,
            routes=record.routes,
            mac=record.mac if any(record.mac) else None,
        )

    def find_veth(self, record: EndpointRecord) -> links.Existing:
        return links.find_veth(record.netns, record.interface)

    def attach(self, ifindex: int, outer: str) -> None:
        self.datapath.attach(ifindex, outer)

    def set_up(self, record: EndpointRecord) -> None:
        links.set_up(record.outer, IPv4Address(record.address), record.mac, _six(record))

    def delete_veth(self, outer: str) -> bool:
        return links.delete_veth(outer)

    def detach(self, outer: str) -> None:
        self.datapath.detach(outer)

    def see(self, record: EndpointRecord) -> Seen:
        """Everything an endpoint is made of, as the kernel has it."""
        tables = self.datapath.tables
        row = tables.endpoints.get(record.ifindex)
        local = [tables.local4.get(record.address)]
        if record.address6:
            local.append(tables.local6.get(record.address6))
        return Seen(
            inside=links.look_inside(record.netns, record.interface),
            outer=links.ifindex_of(record.outer) == record.ifindex,
            carrier=links.has_carrier(record.outer),
            judged=record.outer in self.datapath.attached(),
            row=row is not None and (row.id, row.identity) == (record.id, record.identity),
            delivered=all(to is not None and to.ifindex == record.ifindex for to in local),
        )

    def forget_flows(self, record: EndpointRecord) -> int:
        found = [IPv4Address(record.address), _six(record)]
        flows = self.datapath.tables.ct
        return sum(forget_address(flows, mapped(address)) for address in found if address)


def _six(record: EndpointRecord) -> IPv6Address | None:
    return IPv6Address(record.address6) if record.address6 else None
