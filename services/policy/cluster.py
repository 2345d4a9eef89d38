"""ClusterNetworkPolicy (v1alpha2): one rule of ordered clauses in the Admin or the Baseline tier.

It never isolates: a direction without clauses, or that no clause decides, falls to the next tier.
"""

from __future__ import annotations

from typing import Final

from identity.labels import K8S, NAMESPACE_KEY
from identity.selector import Operator, Requirement, Selector
from services.policy.clauses import Action, Direction, NamedPort, PortRange, Tier
from services.policy.features import Features
from services.policy.model import (
    CidrPeer,
    EndpointPeer,
    FqdnPeer,
    NodePeer,
    Peer,
    PolicyClause,
    Position,
    Rule,
    Stance,
)
from services.policy.peers import read_domain, read_network
from services.policy.ports import LAST_PORT, SCTP, TCP, UDP
from services.policy.reader import Cursor, Fields, one_of
from services.policy.selectors import NAMESPACE_LABELS, POD_LABELS, read_selector

MAX_ENTRIES: Final = 25
MAX_PRIORITY: Final = 1000

_TIERS: Final = {"Admin": Tier.ADMIN, "Baseline": Tier.BASELINE}
_ACTIONS: Final = {"Accept": Action.ALLOW, "Deny": Action.DENY, "Pass": Action.PASS}
_SIDES: Final = {Direction.INGRESS: ("ingress", "from"), Direction.EGRESS: ("egress", "to")}
_PEERS: Final = {
    Direction.INGRESS: ("namespaces", "pods"),
    Direction.EGRESS: ("namespaces", "pods", "networks", "nodes", "domainNames"),
}
_PROTOCOLS: Final = {"tcp": TCP, "udp": UDP, "sctp": SCTP}
# Endpoints without a namespace (host, world) are in none, whatever a selector says.
_MANAGED: Final = Requirement(K8S, NAMESPACE_KEY, Operator.EXISTS)


def read_cluster_policy(document: Fields) -> tuple[Tier, tuple[Rule, ...]]:
    at = document.require("spec", "add one")
    spec = at.fields("tier", "priority", "subject", "ingress", "egress") if at else None
    if spec is None:
        return Tier.ADMIN, ()
    tier, priority = _tier(spec), _priority(spec)
    subject_at = spec.require("subject", "subject: {namespaces: {}} for every pod")
    chosen = subject_at.fields("namespaces", "pods") if subject_at else None
    subject = _pods(chosen) if chosen is not None else None
    clauses = tuple(
        clause
        for direction in Direction
        for n, at in enumerate(_limited(spec, _SIDES[direction][0]))
        if (clause := _clause(at, direction, n, priority)) is not None
    )
    if subject is None:
        return tier, ()
    position = Position(spec.at.place.line, spec.at.place.column)
    rule = Rule(subject, False, Stance.UNTOUCHED, Stance.UNTOUCHED, clauses, position=position)
    return tier, (rule,)


def _tier(spec: Fields) -> Tier:
    at = spec.require("tier", "Admin or Baseline")
    word = at.text() if at is not None else None
    if at is not None and word is not None and word not in _TIERS:
        at.error(f"tier {one_of(tuple(_TIERS), word)}")
    return _TIERS.get(word or "", Tier.ADMIN)


def _priority(spec: Fields) -> int:
    at = spec.require("priority", f"0..{MAX_PRIORITY}, the lower goes first")
    number = at.integer() if at is not None else None
    if at is not None and number is not None and not 0 <= number <= MAX_PRIORITY:
        at.error(f"priority {number} is not within 0..{MAX_PRIORITY}")
    return number or 0


def _limited(fields: Fields, name: str) -> list[Cursor]:
    found = fields.items(name) or []
    if len(found) > MAX_ENTRIES:
        fields.at.error(f"{len(found)} entries in {name}, at most {MAX_ENTRIES}")
        return []
    return found


def _pods(fields: Fields) -> Selector | None:
    """`namespaces`, or `pods` with both of its selectors."""
    namespaces, pods = fields.get("namespaces"), fields.get("pods")
    if (namespaces is None) == (pods is None):
        fields.at.error("write either namespaces or pods")
        return None
    if namespaces is not None:
        where, who = namespaces, None
    else:
        inner = pods.fields("namespaceSelector", "podSelector") if pods is not None else None
        where_at = inner.require("namespaceSelector", "{} for every namespace") if inner else None
        who = inner.require("podSelector", "{} for every pod") if inner else None
        if where_at is None or who is None:
            return None
        where = where_at
    selector = read_selector(who, POD_LABELS) if who is not None else Selector.EVERYTHING
    return selector.and_(*read_selector(where, NAMESPACE_LABELS).requirements, _MANAGED)


def _clause(at: Cursor, direction: Direction, index: int, priority: int) -> PolicyClause | None:
    side = _SIDES[direction][1]
    fields = at.fields("name", "action", side, "protocols")
    if fields is None:
        return None
    action_at = fields.require("action", "Accept, Deny or Pass")
    word = action_at.text() if action_at is not None else None
    if action_at is not None and word is not None and word not in _ACTIONS:
        action_at.error(f"action {one_of(tuple(_ACTIONS), word)}")
    action = _ACTIONS.get(word or "", Action.DENY)
    entries = _limited(fields, side)
    if not entries:
        at.error(f"{side} needs 1 to {MAX_ENTRIES} peers")
    peers = [peer for entry in entries for peer in _peer(entry, direction, action)]
    ports = [port for entry in _limited(fields, "protocols") for port in _protocol(entry)]
    names = tuple(port for port in ports if isinstance(port, NamedPort))
    ranges = tuple(port for port in ports if isinstance(port, PortRange))
    if names and not all(isinstance(peer, EndpointPeer) for peer in peers):
        at.error("named ports stand with pods and namespaces only; write the number")
    return PolicyClause(
        direction,
        action,
        index,
        tuple(dict.fromkeys(peers)),
        ranges if fields.get("protocols") is not None else None,
        Position(at.place.line, at.place.column),
        names,
        order=priority * (MAX_ENTRIES + 1) + index + 1,
    )


def _peer(at: Cursor, direction: Direction, action: Action) -> list[Peer]:
    known = _PEERS[direction]
    fields = at.fields(*known)
    if fields is None:
        return []
    given = [name for name in known if fields.get(name) is not None]
    if len(given) != 1:
        at.error(f"a peer is exactly one of {', '.join(known)}")
        return []
    match given[0]:
        case "networks":
            found = (read_network(entry) for entry in _limited(fields, "networks"))
            return [CidrPeer(str(network)) for network in found if network is not None]
        case "nodes":
            return _nodes(fields)
        case "domainNames":
            return _domains(fields, action)
        case _:
            selector = _pods(fields)
            return [] if selector is None else [EndpointPeer(selector)]


def _nodes(fields: Fields) -> list[Peer]:
    at = fields.get("nodes")
    if at is None or not at.needs(Features.NODES, "node peers are not supported yet; use networks"):
        return []
    return [NodePeer(read_selector(at))]


def _domains(fields: Fields, action: Action) -> list[Peer]:
    at = fields.get("domainNames")
    message = "domainNames are not supported yet; use networks"
    if at is None or not at.needs(Features.FQDNS, message):
        return []
    if action is not Action.ALLOW:
        at.error("domainNames stand with action Accept only")
    found = (read_domain(entry) for entry in _limited(fields, "domainNames"))
    return [FqdnPeer(pattern) for pattern in found if pattern is not None]


def _protocol(at: Cursor) -> list[PortRange | NamedPort]:
    fields = at.fields(*_PROTOCOLS, "destinationNamedPort")
    if fields is None:
        return []
    given = [name for name in (*_PROTOCOLS, "destinationNamedPort") if fields.get(name) is not None]
    if len(given) != 1:
        at.error(f"a protocol is exactly one of {', '.join(_PROTOCOLS)}, destinationNamedPort")
        return []
    if given[0] == "destinationNamedPort":
        name = fields.text("destinationNamedPort") or ""
        message = "named ports are not supported yet; write the number"
        known = at.needs(Features.NAMED_PORTS, message)
        return [NamedPort(proto, name.lower()) for proto in _PROTOCOLS.values() if known]
    inner_at = fields.get(given[0])
    inner = inner_at.fields("destinationPort") if inner_at is not None else None
    port_at = inner.get("destinationPort") if inner is not None else None
    bounds = (0, LAST_PORT) if port_at is None else _bounds(port_at)
    return [] if bounds is None else [PortRange(_PROTOCOLS[given[0]], *bounds)]


def _bounds(at: Cursor) -> tuple[int, int] | None:
    fields = at.fields("number", "range")
    if fields is None:
        return None
    number_at, range_at = fields.get("number"), fields.get("range")
    if (number_at is None) == (range_at is None):
        at.error("write either number or range")
        return None
    if number_at is not None:
        low = high = _port(number_at)
    else:
        inner = range_at.fields("start", "end") if range_at is not None else None
        start = inner.require("start", "the first port") if inner is not None else None
        end = inner.require("end", "the last port") if inner is not None else None
        low, high = (_port(one) if one is not None else None for one in (start, end))
    if low is None or high is None:
        return None
    if low > high:
        at.error(f"the range {low}..{high} is empty; swap its ends")
        return None
    return low, high


def _port(at: Cursor) -> int | None:
    number = at.integer()
    if number is None or 1 <= number <= LAST_PORT:
        return number
    at.error(f"port {number} is not within 1..{LAST_PORT}")
    return None
