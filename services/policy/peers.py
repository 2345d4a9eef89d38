"""Peers of a manifest's clause: endpoint selectors, entities, CIDRs, names, nodes, services."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from identity.selector import Selector
from services.policy.clauses import Direction
from services.policy.features import Features
from services.policy.l7 import canonical
from services.policy.model import (
    CidrGroupPeer,
    CidrPeer,
    EndpointPeer,
    EntityPeer,
    FqdnPeer,
    NamedPeer,
    NodePeer,
    Peer,
)
from services.policy.reader import Cursor, Fields, one_of
from services.policy.selectors import POD_LABELS, Scope, read_selector

ENTITIES: Final = (
    "all",
    "world",
    "world-ipv4",
    "world-ipv6",
    "host",
    "remote-node",
    "kube-apiserver",
    "health",
    "init",
    "ingress",
    "unmanaged",
    "none",
    "cluster",
)

_SUFFIXES: Final = ("Endpoints", "CIDR", "CIDRSet", "Entities", "Nodes", "Groups")
_LIMITED: Final = (
    (
        "Nodes",
        Features.NODES,
        "node label peers are not supported yet; use entities host and remote-node",
    ),
    ("Groups", Features.CLOUD_GROUPS, "cloud groups are not supported yet; use a CIDR set"),
    (
        "Services",
        Features.SERVICES,
        "toServices is not supported yet; select the backends by label",
    ),
    ("FQDNs", Features.FQDNS, "toFQDNs is not supported yet; use a CIDR set"),
    (
        "Requires",
        Features.REQUIREMENTS,
        "requirements grant nothing and are not supported; put the"
        " labels into the endpoint selectors of each clause",
    ),
)
_NAME = re.compile(r"[a-zA-Z0-9_.-]+")
_PATTERN = re.compile(r"[a-zA-Z0-9_.*-]+")
MAX_NAME: Final = 255

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def peer_fields(direction: Direction) -> tuple[str, ...]:
    """The names of every field that chooses peers, those not supported yet included."""
    if direction is Direction.INGRESS:
        return tuple(f"from{suffix}" for suffix in (*_SUFFIXES, "Requires"))
    return tuple(f"to{suffix}" for suffix in (*_SUFFIXES, "Requires", "Services", "FQDNs"))


def read_peers(
    clause: Fields, direction: Direction, scope: Scope, subject: Selector
) -> tuple[Peer, ...] | None:
    """None: the clause has no peer field at all. (): it has, and they are empty."""
    side = "from" if direction is Direction.INGRESS else "to"

    def endpoint(at: Cursor) -> Peer | None:
        return EndpointPeer(scope.peer(read_selector(at), subject))

    readers: dict[str, Callable[[Cursor], Peer | None]] = {
        f"{side}Endpoints": endpoint,
        f"{side}Entities": _entity,
        f"{side}CIDR": _cidr,
        f"{side}CIDRSet": read_cidr_block,
        f"{side}Nodes": lambda at: NodePeer(read_selector(at)),
        f"{side}Groups": lambda at: _named("cloud", at, ("aws",)),
        "toServices": _service,
        "toFQDNs": _fqdn,
    }
    _refuse_unsupported(clause, side)
    present = [name for name in peer_fields(direction) if clause.get(name) is not None]
    present = [name for name in present if not name.endswith("Requires")]
    filled = [name for name in present if clause.items(name)]
    if len(filled) > 1:
        clause.at.error(
            f"combining {' and '.join(filled)} in one clause is not possible; write one clause each"
        )
    if not present:
        return None
    found = [readers[name](at) for name in filled for at in clause.items(name) or ()]
    return tuple(dict.fromkeys(peer for peer in found if peer is not None))


def read_requirements(
    clause: Fields, direction: Direction, scope: Scope, subject: Selector
) -> list[Selector]:
    """What fromRequires or toRequires demand: every endpoint peer of the subject must meet it."""
    side = "from" if direction is Direction.INGRESS else "to"
    found = clause.items(f"{side}Requires") or ()
    return [scope.peer(read_selector(at), subject) for at in found]


def _refuse_unsupported(clause: Fields, side: str) -> None:
    for suffix, feature, message in _LIMITED:
        at = clause.get(f"{side}{suffix}")
        if at is not None and at.items():
            at.needs(feature, message)


def read_name_pattern(at: Cursor) -> str | None:
    """The one name or pattern of a DNS selector, in lower case and without a last dot."""
    fields = at.fields("matchName", "matchPattern")
    if fields is None:
        return None
    name, pattern = fields.get("matchName"), fields.get("matchPattern")
    if (name is None) == (pattern is None):
        at.error("write either matchName or matchPattern")
        return None
    chosen, allowed = (name, _NAME) if name is not None else (pattern, _PATTERN)
    word = chosen.text() if chosen is not None else None
    if chosen is None or word is None:
        return None
    if not allowed.fullmatch(word) or len(word) > MAX_NAME:
        also = "" if name is not None else " and '*'"
        chosen.error(
            f"{word!r} is no DNS name; use letters, digits, '-', '_', '.'{also}, at most {MAX_NAME}"
        )
        return None
    return word.lower().rstrip(".") or word


def read_domain(at: Cursor) -> str | None:
    """A DNS name, or a pattern that begins with '*.': any number of labels in its place."""
    word = at.text()
    if word is None:
        return None
    rest = word.removeprefix("*.")
    if not _NAME.fullmatch(rest) or len(word) > MAX_NAME:
        at.error(f"{word[:80]!r} is no domain name; write it like example.com or *.example.com")
        return None
    name = rest.lower().rstrip(".") or rest
    return f"**.{name}" if rest != word else name


def _fqdn(at: Cursor) -> Peer | None:
    pattern = read_name_pattern(at)
    return None if pattern is None else FqdnPeer(pattern)


def _service(at: Cursor) -> Peer | None:
    fields = at.fields("k8sService", "k8sServiceSelector")
    if fields is None:
        return None
    if (fields.get("k8sService") is None) == (fields.get("k8sServiceSelector") is None):
        at.error("write either k8sService or k8sServiceSelector")
        return None
    if (by_name := fields.get("k8sService")) is not None:
        by_name.fields("serviceName", "namespace")
    if (by_label := fields.get("k8sServiceSelector")) is not None:
        inner = by_label.fields("selector", "namespace")
        selector = inner.get("selector") if inner is not None else None
        if selector is not None:
            read_selector(selector)
    return NamedPeer(f"service({canonical(at.plain())})")


def _named(kind: str, at: Cursor, known: tuple[str, ...]) -> Peer | None:
    return NamedPeer(f"{kind}({canonical(at.plain())})") if at.fields(*known) else None


def _entity(at: Cursor) -> Peer | None:
    name = at.text()
    if name is None:
        return None
    if name not in ENTITIES:
        at.error(f"unsupported entity: {one_of(ENTITIES, name)}")
        return None
    return EntityPeer(name)


def _cidr(at: Cursor) -> Peer | None:
    text = at.text()
    network = _network(at, text, prefix_needed=False) if text is not None else None
    return None if network is None else CidrPeer(str(network))


def read_network(at: Cursor) -> Network | None:
    """A prefix; host bits are masked off."""
    text = at.text()
    return _network(at, text, prefix_needed=True) if text is not None else None


def read_cidr_block(at: Cursor) -> Peer | None:
    """An entry of a CIDR set, or an ipBlock: `cidr` and what is excepted from it."""
    fields = at.fields("cidr", "except", "cidrGroupRef", "cidrGroupSelector")
    if fields is None:
        return None
    for name in ("cidrGroupRef", "cidrGroupSelector"):
        if (group := fields.get(name)) is not None:
            return _cidr_group(fields, group)
    cidr = fields.require("cidr", "for example 10.0.0.0/8")
    text = cidr.text() if cidr is not None else None
    network = _network(cidr, text, prefix_needed=True) if cidr and text is not None else None
    excepts = [_except(entry, network) for entry in fields.items("except") or ()]
    if network is None:
        return None
    return CidrPeer(str(network), tuple(sorted({str(e) for e in excepts if e is not None})))


def _cidr_group(fields: Fields, group: Cursor) -> Peer | None:
    message = "CIDR groups are not supported yet; list the prefixes"
    if not group.needs(Features.CIDR_GROUPS, message):
        return None
    if (cidr := fields.get("cidr")) is not None:
        cidr.error("cidr and a CIDR group cannot stand in one entry; write two entries")
    holes = (read_network(entry) for entry in fields.items("except") or ())
    excepts = tuple(sorted({str(hole) for hole in holes if hole is not None}))
    if fields.get("cidrGroupRef") is not None:
        name = group.text()
        return CidrGroupPeer(name, None, excepts) if name else None
    return CidrGroupPeer("", read_selector(group, POD_LABELS), excepts)


def _except(at: Cursor, within: Network | None) -> Network | None:
    network = read_network(at)
    if network is None or within is None:
        return None
    if not contains(within, network):
        at.error(f"except {network} does not lie within {within}; remove or correct it")
        return None
    return network


def contains(outer: Network, inner: Network) -> bool:
    return (
        outer.version == inner.version
        and outer.prefixlen <= inner.prefixlen
        and inner.network_address in outer
    )


def _network(at: Cursor, text: str, *, prefix_needed: bool) -> Network | None:
    address, slash, length = text.partition("/")
    if prefix_needed and not slash:
        at.error(f"{text!r} is not a prefix; write {text}/32 for one address, for example")
        return None
    plain = not slash or (length.isascii() and length.isdigit() and len(length) <= 3)
    if plain and "%" not in address:
        with suppress(ValueError):
            return ipaddress.ip_network(text, strict=False)
    at.error(f"unable to parse CIDR {text!r}; write it as 10.0.0.0/8 or 2001:db8::/32")
    return None
