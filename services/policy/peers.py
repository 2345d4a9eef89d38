"""Peers of a manifest's clause: endpoint selectors, entities, CIDRs."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

from identity.selector import Selector
from services.policy.clauses import Direction
from services.policy.model import CidrPeer, EndpointPeer, EntityPeer, Peer
from services.policy.reader import Cursor, Fields, one_of
from services.policy.selectors import Scope, read_selector

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
_NOT_YET: Final[Mapping[str, str]] = {
    "Nodes": "node label peers are not supported yet; use entities host and remote-node",
    "Groups": "cloud groups are not supported yet; use a CIDR set",
    "Services": "toServices is not supported yet; select the backends by label",
    "FQDNs": "toFQDNs is not supported yet; use a CIDR set",
    "Requires": "requirements grant nothing and are not supported; put the labels into the"
    " endpoint selectors of each clause",
}

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
    found = [
        readers[name](at) for name in filled if name in readers for at in clause.items(name) or ()
    ]
    return tuple(dict.fromkeys(peer for peer in found if peer is not None))


def _refuse_unsupported(clause: Fields, side: str) -> None:
    for suffix, message in _NOT_YET.items():
        at = clause.get(f"{side}{suffix}")
        if at is not None and at.items():
            at.error(message)


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


def read_cidr_block(at: Cursor) -> Peer | None:
    """An entry of a CIDR set, or an ipBlock: `cidr` and what is excepted from it."""
    fields = at.fields("cidr", "except", "cidrGroupRef", "cidrGroupSelector")
    if fields is None:
        return None
    for name in ("cidrGroupRef", "cidrGroupSelector"):
        if (group := fields.get(name)) is not None:
            group.error("CIDR groups are not supported yet; list the prefixes")
            return None
    cidr = fields.require("cidr", "for example 10.0.0.0/8")
    text = cidr.text() if cidr is not None else None
    network = _network(cidr, text, prefix_needed=True) if cidr and text is not None else None
    excepts = [_except(entry, network) for entry in fields.items("except") or ()]
    if network is None:
        return None
    return CidrPeer(str(network), tuple(sorted({str(e) for e in excepts if e is not None})))


def _except(at: Cursor, within: Network | None) -> Network | None:
    text = at.text()
    network = _network(at, text, prefix_needed=True) if text is not None else None
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
