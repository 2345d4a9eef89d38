"""One flow event, as people and programs read it (one JSON object per line on the wire)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

Verdict = Literal["FORWARDED", "DROPPED", "REDIRECTED"]
FlowDirection = Literal["INGRESS", "EGRESS"]

_PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPV6", 132: "SCTP"}
_TCP_FLAGS = ("FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR")

# Hubble's DropReason names for the reasons the programs give.
DROP_REASONS = {
    130: "INVALID_SOURCE_MAC",
    132: "INVALID_SOURCE_IP",
    133: "POLICY_DENIED",
    134: "INVALID_PACKET_DROPPED",
    135: "CT_TRUNCATED_OR_INVALID_HEADER",
    137: "CT_UNKNOWN_L4_PROTOCOL",
    139: "UNSUPPORTED_L3_PROTOCOL",
    147: "ERROR_RETRIEVING_TUNNEL_KEY",
    152: "NO_MATCHING_LOCAL_CONTAINER_FOUND",
    155: "CT_MAP_INSERTION_FAILED",
    156: "INVALID_IPV6_EXTENSION_HEADER",
    157: "IP_FRAGMENTATION_NOT_SUPPORTED",
    160: "NO_TUNNEL_OR_ENCAPSULATION_ENDPOINT",
    165: "NO_CONFIGURATION",
    166: "UNSUPPORTED_L2_PROTOCOL",
    167: "NO_MAPPING_FOR_NAT_MASQUERADE",
    168: "UNSUPPORTED_PROTOCOL_FOR_NAT_MASQUERADE",
    170: "ENCAPSULATION_TRAFFIC_IS_PROHIBITED",
    172: "UNKNOWN_SENDER",
    175: "FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND",
    176: "FORBIDDEN_ICMPV6_MESSAGE",
    181: "POLICY_DENY",
    183: "INVALID_VNI",
    203: "ENDPOINT_NOT_READY",
    205: "PROXY_UNAVAILABLE",
}


@dataclass(frozen=True, slots=True)
class Party:
    """One end. namespace and name are empty where the address belongs to no known endpoint."""

    ip: str
    port: int
    identity: int
    namespace: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Judge:
    """The endpoint whose policy gave the verdict."""

    id: int
    identity: int = 0
    namespace: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Flow:
    """`port` is 0 for ICMP, whose type is in `icmp_type`. `drop_reason` 0: not dropped."""

    time: str
    verdict: Verdict
    direction: FlowDirection
    source: Party
    destination: Party
    proto: str
    tcp_flags: str
    drop_reason: int
    drop_reason_desc: str
    rule_id: int
    rule: str
    endpoint: Judge
    icmp_type: int = 0
    icmp_code: int = 0
    length: int = 0
    node: str = ""


def protocol_name(number: int) -> str:
    return _PROTOCOLS.get(number, str(number))


def tcp_flags_text(bits: int) -> str:
    """The flag byte of a TCP header as `SYN,ACK`."""
    return ",".join(name for at, name in enumerate(_TCP_FLAGS) if bits & 1 << at)


def drop_reason_text(reason: int) -> str:
    return DROP_REASONS.get(reason, f"REASON_{reason}") if reason else ""


def encode_line(flow: Flow) -> bytes:
    return msgspec.json.encode(flow) + b"\n"


def decode_line(line: bytes) -> Flow:
    """Raises `msgspec.ValidationError`."""
    return msgspec.json.decode(line, type=Flow)
