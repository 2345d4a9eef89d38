"""A tunnel between a KernelNode and its remote end, which plays another node by hand."""

from __future__ import annotations

import socket
import struct

from datapath import links
from datapath.maps.layout import IpcacheEntry, Node
from tests.fakes.kernel_node import NODE, REMOTE, KernelNode, Workload
from tests.fakes.netns import Namespace, checksum

VXLAN = 8472
DEVICE = "tsrvx"
REMOTE_NODE = 6
FAR = "10.88.0.5"  # an endpoint on the other node


def open_tunnel(node: KernelNode) -> int:
    """The VXLAN device, judged; the other node known. Its ifindex."""
    if f" {DEVICE}:" not in node.ns.ip("link"):
        node.ns.ip(f"link add {DEVICE} type vxlan external dstport {VXLAN} nolearning")
        node.ns.ip(f"link set {DEVICE} arp off up")
        node.ns.ip(f"route add 10.88.0.0/24 dev {DEVICE} src {NODE}")
    index = node.call(lambda: links.ifindex_of(DEVICE))
    node.call(lambda: node.datapath.attach(index, DEVICE, "overlay"))
    node.configure(overlay_ifindex=index, tunnel_port=VXLAN)
    node.tables.nodes.put_many({int(REMOTE): Node(REMOTE_NODE)})
    return index


def known(node: KernelNode, address: int, identity: int) -> None:
    """An endpoint behind the other node's tunnel."""
    node.tables.ipcache4.put_many({address: IpcacheEntry(identity, int(REMOTE))})


def wrapped(vni: int, packet: bytes) -> bytes:
    """An IP packet in Ethernet in VXLAN; the hardware addresses are nobody's."""
    kind = b"\x86\xdd" if packet[0] >> 4 == 6 else b"\x08\x00"
    return struct.pack("!2I", 0x08000000, vni << 8) + b"\2\0\0\0\0\1\2\0\0\0\0\2" + kind + packet


def far_datagram(w: Workload, sport: int, dport: int, *, source: str = FAR) -> bytes:
    """From the other node's endpoint to `w`."""
    payload = struct.pack("!4H", sport, dport, 9, 0) + b"x"
    head = struct.pack("!2B3H2BH", 0x45, 0, 20 + len(payload), 0, 0, 64, 17, 0)
    head += socket.inet_aton(source) + w.address.packed
    return head[:10] + checksum(head).to_bytes(2, "big") + head[12:] + payload


class OtherNode:
    """The far end of the tunnel: what arrives there, and what is sent from there."""

    def __init__(self, ns: Namespace) -> None:
        self.sock = ns.udp(VXLAN)

    def send(self, vni: int, packet: bytes) -> None:
        self.sock.sendto(wrapped(vni, packet), (str(NODE), VXLAN))

    def receive(self) -> tuple[int, bytes]:
        """(VNI, IP packet)."""
        data = self.sock.recv(4096)
        return struct.unpack_from("!I", data, 4)[0] >> 8, data[22:]
