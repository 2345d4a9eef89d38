"""CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy: a spec becomes a Rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from identity.selector import Selector
from services.policy.clauses import Action, Direction, PortRange
from services.policy.model import Peer, PolicyClause, Position, Rule, Stance
from services.policy.peers import peer_fields, read_peers
from services.policy.ports import read_ports_of
from services.policy.reader import Cursor, Fields, one_of
from services.policy.selectors import Scope, read_selector

_LISTS: Final = (
    ("ingress", Direction.INGRESS, Action.ALLOW),
    ("ingressDeny", Direction.INGRESS, Action.DENY),
    ("egress", Direction.EGRESS, Action.ALLOW),
    ("egressDeny", Direction.EGRESS, Action.DENY),
)
_RULE_FIELDS: Final = (
    "endpointSelector",
    "nodeSelector",
    *(name for name, _, _ in _LISTS),
    "enableDefaultDeny",
    "labels",
    "description",
    "log",
)
_AUTH_MODES: Final = ("disabled", "required", "test-always-fail")


def read_specs(document: Fields, scope: Scope) -> tuple[Rule, ...]:
    """`spec` first, then `specs`."""
    found = [document.get("spec")] if document.get("spec") is not None else []
    found += document.items("specs") or []
    if not found:
        document.at.error("the policy is empty; add a spec")
    rules = [read_rule(at, scope) for at in found if at is not None]
    return tuple(rule for rule in rules if rule is not None)


def read_rule(at: Cursor, scope: Scope) -> Rule | None:
    rule = at.fields(*_RULE_FIELDS)
    if rule is None:
        return None
    on_nodes, selector_at = _subject_field(rule, scope)
    if selector_at is None:
        return None
    written = read_selector(selector_at)
    subject = written if on_nodes else scope.subject(written, selector_at)
    clauses = tuple(_clauses(rule, scope, subject))
    if (log := rule.get("log")) is not None:
        log.advise("log.value is not returned with flows yet; it is kept in the manifest")
    switches = _switches(rule)
    ingress, egress = (_stance(clauses, direction, switches) for direction in Direction)
    return Rule(subject, on_nodes, ingress, egress, clauses)


def _subject_field(rule: Fields, scope: Scope) -> tuple[bool, Cursor | None]:
    endpoints, nodes = rule.get("endpointSelector"), rule.get("nodeSelector")
    if endpoints is not None and nodes is not None:
        nodes.error("endpointSelector and nodeSelector cannot stand together; keep one of them")
        return False, None
    if nodes is not None and scope.namespace is not None:
        nodes.error("nodeSelector needs a CiliumClusterwideNetworkPolicy; change the kind")
        return True, None
    if nodes is None and endpoints is None:
        rule.at.error("endpointSelector is missing; write endpointSelector: {} for all endpoints")
    return nodes is not None, nodes if nodes is not None else endpoints


def _switches(rule: Fields) -> dict[Direction, bool | None]:
    at = rule.get("enableDefaultDeny")
    fields = at.fields("ingress", "egress") if at is not None else None
    if fields is None:
        return {}
    found = ((direction, fields.get(direction.name.lower())) for direction in Direction)
    return {direction: cursor.boolean() for direction, cursor in found if cursor is not None}


def _stance(
    clauses: tuple[PolicyClause, ...],
    direction: Direction,
    switches: dict[Direction, bool | None],
) -> Stance:
    if not any(clause.direction is direction for clause in clauses):
        return Stance.UNTOUCHED
    return Stance.DEFAULT_ALLOW if switches.get(direction) is False else Stance.DEFAULT_DENY


def _clauses(rule: Fields, scope: Scope, subject: Selector) -> Iterator[PolicyClause]:
    for name, direction, action in _LISTS:
        for index, at in enumerate(rule.items(name) or ()):
            clause = _clause(at, direction, action, scope, subject)
            if clause is not None:
                peers, ports = clause
                position = Position(at.place.line, at.place.column)
                yield PolicyClause(direction, action, index, peers, ports, position)


def _clause(
    at: Cursor, direction: Direction, action: Action, scope: Scope, subject: Selector
) -> tuple[tuple[Peer, ...] | None, tuple[PortRange, ...] | None] | None:
    deny = action is Action.DENY
    known = (*peer_fields(direction), "toPorts", "icmps")
    fields = at.fields(*known) if deny else at.fields(*known, "authentication")
    if fields is None:
        return None
    if not deny:
        _authentication(fields)
    peers = read_peers(fields, direction, scope, subject)
    ports = read_ports_of(fields, deny=deny)
    if peers is None and ports is None:
        # Neither peers nor ports: a clause that grants nothing, unlike in a NetworkPolicy.
        return (), None
    return peers, ports


def _authentication(clause: Fields) -> None:
    at = clause.get("authentication")
    fields = at.fields("mode") if at is not None else None
    mode_at = fields.require("mode", f"one of {', '.join(_AUTH_MODES)}") if fields else None
    mode = mode_at.text() if mode_at is not None else None
    if mode_at is None or mode is None or mode == "disabled":
        return
    if mode not in _AUTH_MODES:
        mode_at.error(f"authentication mode {one_of(_AUTH_MODES, mode)}")
    else:
        mode_at.error("authentication is not supported yet; remove it to allow without a handshake")
