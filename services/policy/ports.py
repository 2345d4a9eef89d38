"""toPorts, icmps and NetworkPolicy ports of a manifest, as port ranges per protocol number.

A port name stays a name: which number it is depends on the endpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from services.policy.clauses import NamedPort, PortRange
from services.policy.features import Dialect, Features
from services.policy.l7 import DNS, LISTENER, TLS, ProxyRule
from services.policy.model import ProxiedPorts
from services.policy.proxy_rules import FIELDS, Place, read_proxy_rule
from services.policy.reader import Cursor, Fields, one_of

TCP: Final = 6
UDP: Final = 17
SCTP: Final = 132
ICMP: Final = 1
ICMPV6: Final = 58

MAX_PORTS: Final = 40
MAX_ICMP_FIELDS: Final = 40
LAST_PORT: Final = 65535

PROTOCOLS: Final[Mapping[str, tuple[int, ...]]] = {
    "TCP": (TCP,),
    "UDP": (UDP,),
    "SCTP": (SCTP,),
    "ANY": (TCP, UDP, SCTP),
}

_PORT_NAME = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9]+(-[A-Za-z0-9]+)*")
_ICMP_NAMES: Final[Mapping[str, int]] = {
    "EchoReply": 0,
    "DestinationUnreachable": 3,
    "Redirect": 5,
    "Echo": 8,
    "EchoRequest": 8,
    "RouterAdvertisement": 9,
    "RouterSelection": 10,
    "TimeExceeded": 11,
    "ParameterProblem": 12,
    "Timestamp": 13,
    "TimestampReply": 14,
    "Photuris": 40,
    "ExtendedEchoRequest": 42,
    "ExtendedEchoReply": 43,
}
_ICMPV6_NAMES: Final[Mapping[str, int]] = {
    "DestinationUnreachable": 1,
    "PacketTooBig": 2,
    "TimeExceeded": 3,
    "ParameterProblem": 4,
    "EchoRequest": 128,
    "EchoReply": 129,
    "MulticastListenerQuery": 130,
    "MulticastListenerReport": 131,
    "MulticastListenerDone": 132,
    "RouterSolicitation": 133,
    "RouterAdvertisement": 134,
    "NeighborSolicitation": 135,
    "NeighborAdvertisement": 136,
    "RedirectMessage": 137,
    "RouterRenumbering": 138,
    "ICMPNodeInformationQuery": 139,
    "ICMPNodeInformationResponse": 140,
    "InverseNeighborDiscoverySolicitation": 141,
    "InverseNeighborDiscoveryAdvertisement": 142,
    "HomeAgentAddressDiscoveryRequest": 144,
    "HomeAgentAddressDiscoveryReply": 145,
    "MobilePrefixSolicitation": 146,
    "MobilePrefixAdvertisement": 147,
    "DuplicateAddressRequestCodeSuffix": 157,
    "DuplicateAddressConfirmationCodeSuffix": 158,
    "ExtendedEchoRequest": 160,
    "ExtendedEchoReply": 161,
}
_FAMILIES: Final[Mapping[str, tuple[int, Mapping[str, int]]]] = {
    "IPv4": (ICMP, _ICMP_NAMES),
    "IPv6": (ICMPV6, _ICMPV6_NAMES),
}


Port = PortRange | NamedPort


@dataclass(frozen=True, slots=True)
class ClausePorts:
    """The ports a clause allows or denies as such, and those it allows through a proxy."""

    ranges: tuple[PortRange, ...] = ()
    names: tuple[NamedPort, ...] = ()
    proxied: tuple[ProxiedPorts, ...] = ()


def read_ports_of(clause: Fields, place: Place) -> ClausePorts | None:
    """What toPorts or icmps of a Cilium clause say. None: it does not speak of ports.

    An absent and an empty list differ only where the clause names no peers; the caller knows.
    """
    to_ports, icmps = clause.items("toPorts"), clause.items("icmps")
    if to_ports and icmps:
        clause.at.error("toPorts and icmps cannot stand in one clause; write two clauses")
        return ClausePorts()
    if to_ports:
        return _clause_ports([_port_rule(entry, place) for entry in to_ports])
    if icmps:
        return ClausePorts(tuple(found for entry in icmps for found in _icmp_rule(entry)))
    return None


def _clause_ports(entries: Iterable[tuple[list[Port], ProxyRule | None]]) -> ClausePorts:
    bare: list[Port] = []
    proxied: list[ProxiedPorts] = []
    for ports, rule in entries:
        if rule is None:
            bare += ports
        elif ports:
            proxied.append(ProxiedPorts(*_sorted_out(ports), rule))
    return ClausePorts(*_sorted_out(bare), tuple(proxied))


def _sorted_out(ports: Iterable[Port]) -> tuple[tuple[PortRange, ...], tuple[NamedPort, ...]]:
    held = tuple(ports)
    ranges = tuple(port for port in held if isinstance(port, PortRange))
    return ranges, tuple(port for port in held if isinstance(port, NamedPort))


def _port_rule(at: Cursor, place: Place) -> tuple[list[Port], ProxyRule | None]:
    entry = at.fields("ports", *FIELDS)
    if entry is None:
        return [], None
    rule = read_proxy_rule(entry, place)
    ports = entry.items("ports") or []
    if len(ports) > MAX_PORTS:
        at.error(f"{len(ports)} ports in one entry, at most {MAX_PORTS}; use two toPorts entries")
        return [], None
    found = [one for port in ports for one in _cilium_port(port)]
    if rule is not None:
        _check_proxied(at, ports, found, rule)
    return found, rule


def _check_proxied(at: Cursor, ports: list[Cursor], found: list[Port], rule: ProxyRule) -> None:
    """L7 rules bind themselves to protocols and ports that a proxy can serve."""
    if rule.parser in (TLS, LISTENER):
        return
    if rule.parser == DNS and not ports:
        at.error("dns rules need a port; write port 53")
    if any(isinstance(port, PortRange) and port.lo == 0 for port in found):
        at.error("L7 rules cannot stand with port 0; name the port")
    for port in ports:
        fields = port.fields("port", "endPort", "protocol")
        if fields is None:
            continue
        word = (fields.text("protocol") or "ANY").upper()
        if rule.parser == DNS:
            if fields.get("endPort") is not None:
                port.error("dns rules do not stand with a port range; name one port")
            if word == "SCTP":
                port.error("dns rules need protocol TCP, UDP or ANY")
        elif word != "TCP":
            port.error(f"L7 rules need protocol TCP, not {word}; write protocol: TCP")


def _cilium_port(at: Cursor) -> list[Port]:
    fields = at.fields("port", "endPort", "protocol")
    if fields is None:
        return []
    port = fields.require("port", 'for example "80", or "0" for every port')
    word = port.text() if port is not None else None
    protocols = _protocols(fields, "ANY", PROTOCOLS)
    if port is None or word is None:
        return []
    if not word:
        port.error('port must be specified, for example "80", or "0" for every port')
        return []
    return _ports(port, word, fields.get("endPort"), protocols)


def _protocols(
    fields: Fields, default: str, known: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    at = fields.get("protocol")
    word = at.text() if at is not None else None
    if at is None or word is None or not word:
        return known[default]
    if word.upper() not in known:
        hint = "; use icmps for ICMP" if word.upper().startswith("ICMP") else ""
        at.error(f"protocol {one_of(tuple(known), word)}{hint}")
        return ()
    return known[word.upper()]


def _ports(at: Cursor, word: str, end_at: Cursor | None, protocols: tuple[int, ...]) -> list[Port]:
    if not (word.isascii() and word.isdigit()):
        return [NamedPort(protocol, word.lower()) for protocol in protocols if _is_name(at, word)]
    number = _number(at, word)
    end = end_at.integer() if end_at is not None else None
    if number is None:
        return []
    if end is not None and end_at is not None:
        if not 0 <= end <= LAST_PORT:
            end_at.error(f"endPort {end} is not within 0..{LAST_PORT}")
            return []
        if 0 < end < number:
            end_at.advise(f"endPort {end} is below port {number}: only port {number} is meant then")
    last = end if end is not None and end > number else number
    if last == 0:
        last = LAST_PORT
    return [PortRange(protocol, number, last) for protocol in protocols]


def _number(at: Cursor, word: str) -> int | None:
    if len(word) <= 10 and int(word) <= LAST_PORT:
        return int(word)
    at.error(f"port {word[:20]} is not within 0..{LAST_PORT}")
    return None


def _is_name(at: Cursor, word: str) -> bool:
    if len(word) <= 15 and _PORT_NAME.fullmatch(word):
        message = f"named ports ({word!r}) are not supported yet; write the number"
        return at.needs(Features.NAMED_PORTS, message)
    at.error(
        f"port {word[:80]!r} is neither a number within 0..{LAST_PORT} nor a port name of at most"
        " 15 letters, digits and '-'"
    )
    return False


def _icmp_rule(at: Cursor) -> list[PortRange]:
    rule = at.fields("fields")
    fields = (rule.items("fields") if rule is not None else None) or []
    if len(fields) > MAX_ICMP_FIELDS:
        at.error(f"{len(fields)} ICMP fields, at most {MAX_ICMP_FIELDS}; use two icmps entries")
        return []
    return [found for field in fields for found in _icmp_field(field)]


def _icmp_field(at: Cursor) -> list[PortRange]:
    fields = at.fields("type", "family")
    if fields is None:
        return []
    family = fields.text("family") or "IPv4"
    type_at = fields.require("type", "an ICMP type number or name, for example EchoRequest")
    word = type_at.port_word() if type_at is not None else None
    if family not in _FAMILIES:
        at.error(f"wrong family: {one_of(tuple(_FAMILIES), family)}")
        return []
    if type_at is None or word is None:
        return []
    protocol, names = _FAMILIES[family]
    number = _icmp_type(type_at, word, family, names)
    if number is None:
        return []
    if number == 0 and protocol == ICMP and at.report.dialect is Dialect.CILIUM_1_17:
        return [PortRange(protocol, 0, LAST_PORT)]
    return [PortRange(protocol, number, number)]


def _icmp_type(at: Cursor, word: str, family: str, names: Mapping[str, int]) -> int | None:
    if word.isascii() and word.isdigit() and len(word) <= 3 and int(word) <= 255:
        return int(word)
    if word in names:
        return names[word]
    if word.lstrip("-").isdigit():
        at.error(f"ICMP type {word} is not within 0..255")
    else:
        at.error(f"ICMP type of {family} {one_of(tuple(names), word)}")
    return None


def read_network_policy_ports(at: list[Cursor]) -> ClausePorts:
    """`ports` of a NetworkPolicy rule: TCP unless it says otherwise; no port is every port."""
    known = {name: numbers for name, numbers in PROTOCOLS.items() if name != "ANY"}
    found: list[Port] = []
    for entry in at:
        fields = entry.fields("port", "endPort", "protocol")
        if fields is None:
            continue
        protocols = _protocols(fields, "TCP", known)
        port, end = fields.get("port"), fields.get("endPort")
        if port is None:
            if end is not None:
                end.error("endPort needs a port; add the first port of the range")
            found += [PortRange(protocol, 0, LAST_PORT) for protocol in protocols]
            continue
        word = port.port_word()
        if word is not None:
            found += _ports(port, word, end, protocols)
    return ClausePorts(*_sorted_out(found))
