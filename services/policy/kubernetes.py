"""Kubernetes NetworkPolicy: one rule whose clauses only allow."""

from __future__ import annotations

from typing import Final

from identity.labels import K8S, NAMESPACE_KEY
from identity.selector import Operator, Requirement, Selector
from services.policy.clauses import Action, Direction
from services.policy.features import Dialect
from services.policy.model import EndpointPeer, Peer, PolicyClause, Position, Rule, Stance
from services.policy.peers import read_cidr_block
from services.policy.ports import ClausePorts, read_network_policy_ports
from services.policy.reader import Cursor, Fields, one_of
from services.policy.selectors import (
    NAMESPACE_LABELS,
    POD_LABELS,
    in_namespace,
    read_selector,
)

_TYPES: Final = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}
_SIDES: Final = {Direction.INGRESS: ("ingress", "from"), Direction.EGRESS: ("egress", "to")}


def read_network_policy(document: Fields, namespace: str) -> tuple[Rule, ...]:
    at = document.require("spec", "add one")
    spec = at.fields("podSelector", "policyTypes", "ingress", "egress") if at else None
    if spec is None:
        return ()
    selector_at = spec.get("podSelector")
    pods = read_selector(selector_at, POD_LABELS) if selector_at else Selector.EVERYTHING
    isolates = _isolates(spec)
    clauses: list[PolicyClause] = []
    for direction, (name, _) in _SIDES.items():
        rules = spec.items(name) or []
        if rules and direction not in isolates:
            rules_at = spec.get(name)
            if rules_at is not None:
                rules_at.advise(f"policyTypes leaves {name} out, so these rules say nothing")
        read = [_clause(rule, n, direction, namespace) for n, rule in enumerate(rules)]
        clauses += [clause for clause in read if clause and direction in isolates]
    ingress, egress = (
        Stance.DEFAULT_DENY if direction in isolates else Stance.UNTOUCHED for direction in _SIDES
    )
    subject = pods.and_(in_namespace(namespace))
    position = Position(spec.at.place.line, spec.at.place.column)
    return (Rule(subject, False, ingress, egress, tuple(clauses), position=position),)


def _isolates(spec: Fields) -> set[Direction]:
    types = spec.items("policyTypes")
    if not types:
        return (
            {Direction.INGRESS, Direction.EGRESS} if spec.items("egress") else {Direction.INGRESS}
        )
    found = set()
    for at in types:
        word = at.text()
        if word in _TYPES:
            found.add(_TYPES[word])
        elif word is not None:
            at.error(f"policy type {one_of(tuple(_TYPES), word)}")
    return found


def _clause(at: Cursor, index: int, direction: Direction, namespace: str) -> PolicyClause | None:
    side = _SIDES[direction][1]
    fields = at.fields(side, "ports")
    if fields is None:
        return None
    written, ports = fields.items(side), fields.items("ports")
    peers: tuple[Peer, ...] | None = None
    if written:
        read = (_peer(peer, namespace) for peer in written)
        peers = tuple(dict.fromkeys(peer for peer in read if peer is not None))
    read_ports = read_network_policy_ports(ports) if ports else ClausePorts()
    return PolicyClause(
        direction,
        Action.ALLOW,
        index,
        peers,
        read_ports.ranges if ports else None,
        Position(at.place.line, at.place.column),
        read_ports.names,
    )


def _peer(at: Cursor, namespace: str) -> Peer | None:
    fields = at.fields("podSelector", "namespaceSelector", "ipBlock")
    if fields is None:
        return None
    pods, namespaces = fields.get("podSelector"), fields.get("namespaceSelector")
    block = fields.get("ipBlock")
    if block is not None:
        if pods is not None or namespaces is not None:
            block.error("ipBlock and a selector cannot stand in one peer; write two peers")
        return read_cidr_block(block)
    if pods is None and namespaces is None:
        return None
    chosen = read_selector(pods, POD_LABELS) if pods is not None else Selector.EVERYTHING
    if namespaces is None:
        return EndpointPeer(chosen.and_(in_namespace(namespace)))
    where = read_selector(namespaces, NAMESPACE_LABELS).requirements
    if where and at.report.dialect is Dialect.CILIUM_1_17:
        return EndpointPeer(chosen.and_(*where))
    # Endpoints without a namespace (host, world) are in none, whatever the selector says.
    managed = Requirement(K8S, NAMESPACE_KEY, Operator.EXISTS)
    return EndpointPeer(chosen.and_(*where, managed))
