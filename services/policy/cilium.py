"""CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy: a spec becomes a Rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Final

from identity.selector import Selector
from services.policy.clauses import Action, Direction
from services.policy.features import Dialect, Features
from services.policy.l7 import Auth
from services.policy.model import PolicyClause, Position, Rule, Stance
from services.policy.peers import peer_fields, read_peers, read_requirements
from services.policy.ports import ClausePorts, read_ports_of
from services.policy.proxy_rules import Place
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
_AUTH_MODES: Final = {
    "disabled": Auth.DISABLED,
    "required": Auth.SPIRE,
    "test-always-fail": Auth.ALWAYS_FAIL,
}

# It stands in every flow of the rule.
MAX_LOG: Final = 256

_Requirement = tuple[Direction, Action, Selector]


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
    reading = _Reading(scope, subject, on_nodes)
    clauses = tuple(_clauses(rule, reading))
    switches = _switches(rule)
    ingress, egress = (_stance(clauses, direction, switches) for direction in Direction)
    required, position = tuple(reading.requirements), Position(at.place.line, at.place.column)
    log = _log(rule)
    return Rule(subject, on_nodes, ingress, egress, clauses, required, position, log)


def _log(rule: Fields) -> str:
    at = rule.get("log")
    fields = at.fields("value") if at is not None else None
    value_at = fields.get("value") if fields is not None else None
    text = value_at.text() if value_at is not None else None
    if value_at is not None and text and not (text.isprintable() and len(text) <= MAX_LOG):
        value_at.error(f"a log value is at most {MAX_LOG} printable characters of one line")
    return text or ""


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


@dataclass(slots=True)
class _Reading:
    """What reading the clauses of one rule depends on, and what it gathers beside them."""

    scope: Scope
    subject: Selector
    on_nodes: bool
    requirements: list[_Requirement] = field(default_factory=list)


def _clauses(rule: Fields, reading: _Reading) -> Iterator[PolicyClause]:
    for name, direction, action in _LISTS:
        for index, at in enumerate(rule.items(name) or ()):
            place = Place(direction, action is Action.DENY, reading.on_nodes)
            checked = not place.deny or at.report.dialect is Dialect.TESSERA
            with nullcontext() if checked else at.report.forgiving():
                clause = _clause(at, index, place, reading)
            if clause is not None:
                yield clause


def _clause(at: Cursor, index: int, place: Place, reading: _Reading) -> PolicyClause | None:
    direction, scope, subject = place.direction, reading.scope, reading.subject
    action = Action.DENY if place.deny else Action.ALLOW
    known = (*peer_fields(direction), "toPorts", "icmps")
    fields = at.fields(*known) if place.deny else at.fields(*known, "authentication")
    if fields is None:
        return None
    auth = None if place.deny else _authentication(fields)
    peers = read_peers(fields, direction, scope, subject)
    required = read_requirements(fields, direction, scope, subject)
    reading.requirements += [(direction, action, selector) for selector in required]
    ports = read_ports_of(fields, place)
    _check_services(fields)
    if peers is None and ports is None:
        # Neither peers nor ports: a clause that grants nothing, unlike in a NetworkPolicy.
        peers = ()
    ranges = None if ports is None else ports.ranges
    held = ports or ClausePorts()
    position = Position(at.place.line, at.place.column)
    return PolicyClause(
        direction, action, index, peers, ranges, position, held.names, held.proxied, auth
    )


def _check_services(clause: Fields) -> None:
    services = clause.get("toServices")
    if services is not None and services.items() and clause.items("toPorts"):
        services.error("toServices brings its own ports; remove toPorts")


def _authentication(clause: Fields) -> Auth | None:
    at = clause.get("authentication")
    fields = at.fields("mode") if at is not None else None
    mode_at = fields.require("mode", f"one of {', '.join(_AUTH_MODES)}") if fields else None
    mode = mode_at.text() if mode_at is not None else None
    if mode_at is None or mode is None:
        return None
    if mode not in _AUTH_MODES:
        mode_at.error(f"authentication mode {one_of(tuple(_AUTH_MODES), mode)}")
        return None
    message = "authentication is not supported yet; remove it to allow without a handshake"
    if mode != "disabled" and not mode_at.needs(Features.AUTHENTICATION, message):
        return None
    return _AUTH_MODES[mode]
