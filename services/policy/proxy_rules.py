"""What a toPorts entry asks of connections: L7 rules, TLS, a listener; read into a ProxyRule.

Each reader reports what it cannot accept on the cursor it was given, as everywhere in reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from services.policy.clauses import Direction
from services.policy.features import Features
from services.policy.l7 import DNS, HTTP, KAFKA, LISTENER, TLS, ProxyRule, canonical
from services.policy.peers import read_name_pattern
from services.policy.reader import Cursor, Fields, is_empty, one_of

_L7: Final = ("http", "kafka", "dns", "l7", "l7proto")
_HTTP: Final = ("path", "method", "host", "headers", "headerMatches")
_KAFKA: Final = ("role", "apiKey", "apiVersion", "clientID", "topic")
_TLS_CONTEXT: Final = ("secret", "trustedCA", "certificate", "privateKey")
_MISMATCH: Final = ("LOG", "ADD", "DELETE", "REPLACE")
_ENVOY_KINDS: Final = ("CiliumEnvoyConfig", "CiliumClusterwideEnvoyConfig")
_MAX_TOPIC: Final = 255
_MAX_EXPRESSION: Final = 4096
_MAX_PRIORITY: Final = 126

_LIMITED: Final = (
    ("rules", Features.L7, "L7 rules"),
    ("terminatingTLS", Features.TLS, "TLS termination"),
    ("originatingTLS", Features.TLS, "TLS origination"),
    ("serverNames", Features.TLS, "TLS server names"),
    ("listener", Features.LISTENERS, "custom listeners"),
)
FIELDS: Final = tuple(name for name, _, _ in _LIMITED)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the clause stands; what L7 may ask depends on it."""

    direction: Direction
    deny: bool = False
    on_nodes: bool = False


def read_proxy_rule(entry: Fields, place: Place) -> ProxyRule | None:
    """None: the entry is a plain allow or deny of its ports."""
    if not _let_in(entry, place):
        return None
    family = _rules(entry, place)
    names = _server_names(entry)
    terminating, originating = (
        _context(entry, f"{end}TLS") for end in ("terminating", "originating")
    )
    if names and family is not None and not terminating:
        entry.at.error("serverNames with L7 rules need terminatingTLS; remove one of them")
    listener = _listener(entry, place)
    if listener is not None:
        if family is not None:
            entry.at.error("a listener cannot stand with L7 rules; write two toPorts entries")
        return ProxyRule(LISTENER, (), names, terminating, originating, *listener)
    if family is not None:
        return ProxyRule(family[0], family[1], names, terminating, originating)
    if names or terminating or originating:
        return ProxyRule(TLS, (), names, terminating, originating)
    return None


def _let_in(entry: Fields, place: Place) -> bool:
    fine = True
    for name, feature, what in _LIMITED:
        at = entry.get(name)
        if at is None or _says_nothing(name, at):
            continue
        if place.deny:
            at.error(f"{what} cannot stand in a deny clause; deny the ports alone")
            fine = False
        else:
            message = f"{what} are not supported yet; remove {name} to allow the ports alone"
            fine = at.needs(feature, message) and fine
    return fine


def _says_nothing(name: str, at: Cursor) -> bool:
    """Empty rules and server names restrict nothing: the entry is a plain allow of its ports."""
    if name != "rules":
        return name == "serverNames" and is_empty(at.node)
    rules = at.fields(*_L7)
    if rules is None or rules.get("l7") is not None:
        return False
    kinds = [rules.get(kind) for kind in (HTTP, KAFKA, DNS)]
    return all(kind is None or (is_empty(kind.node) and not kind.items()) for kind in kinds)


# ------------------------------------------------------------------ rules


def _rules(entry: Fields, place: Place) -> tuple[str, tuple[str, ...]] | None:
    """The parser and its rules."""
    at = entry.get("rules")
    rules = at.fields(*_L7) if at is not None else None
    if at is None or rules is None:
        return None
    families = [name for name in (HTTP, KAFKA, DNS) if rules.get(name) is not None]
    generic, listed = rules.text("l7proto") or "", rules.items("l7") or []
    if generic or rules.get("l7") is not None:
        families.append("l7")
    if len(families) > 1:
        at.error(f"several L7 families in one entry ({', '.join(families)}); write one entry each")
        return None
    if listed and not generic:
        at.error("l7 needs l7proto, the name of the parser")
        return None
    if generic:
        found = [_generic(one) for one in listed]
        parser = generic
    else:
        parser = families[0] if families else ""
        found = [_READERS[parser](one) for one in rules.items(parser) or ()] if parser else []
    if not found:
        return None
    _check_place(at, parser, place)
    return parser, tuple(sorted(set(found)))


def _check_place(at: Cursor, parser: str, place: Place) -> None:
    if place.on_nodes and place.direction is Direction.INGRESS:
        at.error("L7 rules are not possible for traffic to nodes; allow the ports alone")
    elif place.on_nodes and parser != DNS:
        at.error(f"{parser} rules are not possible for traffic from nodes; only dns is")
    elif parser == DNS and place.direction is Direction.INGRESS:
        at.error("dns rules are not possible on ingress; move them to the egress of the client")


def _http(at: Cursor) -> str:
    fields = at.fields(*_HTTP)
    if fields is None:
        return ""
    for name in ("path", "method", "host"):
        word = fields.text(name)
        if word and (fault := _expression_fault(word)):
            fields.at.error(f"{name} {word[:80]!r} is no regular expression: {fault}")
    for header in fields.items("headers") or ():
        text = header.text()
        if text is not None and not text.partition(":")[0].strip():
            header.error('a header is written "Name" or "Name: value"')
    for match in fields.items("headerMatches") or ():
        _header_match(match)
    return canonical(at.plain())


def _expression_fault(text: str) -> str:
    if len(text) > _MAX_EXPRESSION:
        return f"longer than {_MAX_EXPRESSION}"
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as fault:
        return str(fault)
    return ""


def _header_match(at: Cursor) -> None:
    fields = at.fields("name", "value", "secret", "mismatch")
    if fields is None:
        return
    fields.require("name", "the name of the header")
    action = fields.text("mismatch")
    if action and action not in _MISMATCH:
        at.error(f"mismatch {one_of(_MISMATCH, action)}")


def _kafka(at: Cursor) -> str:
    fields = at.fields(*_KAFKA)
    if fields is None:
        return ""
    role, key = fields.text("role"), fields.text("apiKey")
    if role and key:
        at.error("role and apiKey cannot stand together; keep one of them")
    if role and role.lower() not in ("produce", "consume"):
        at.error(f"role {one_of(('produce', 'consume'), role)}")
    if len(fields.text("topic") or "") > _MAX_TOPIC:
        at.error(f"a topic has at most {_MAX_TOPIC} characters")
    return canonical(at.plain())


def _dns(at: Cursor) -> str:
    pattern = read_name_pattern(at)
    return canonical({"name": pattern}) if pattern is not None else ""


def _generic(at: Cursor) -> str:
    fields = at.fields()
    if fields is not None and any(not key for key, _ in fields):
        at.error("empty key; name what the parser shall compare")
    return canonical(at.plain())


_READERS: Final[Mapping[str, Callable[[Cursor], str]]] = {HTTP: _http, KAFKA: _kafka, DNS: _dns}


# ------------------------------------------------------------------ TLS, listeners


def _server_names(entry: Fields) -> tuple[str, ...]:
    found = []
    for at in entry.items("serverNames") or ():
        name = None if is_empty(at.node) else at.text()
        if name:
            found.append(name.lower())
        elif is_empty(at.node) or name == "":
            at.error("empty server name; remove it or write a name")
    return tuple(sorted(set(found)))


def _context(entry: Fields, name: str) -> str:
    at = entry.get(name)
    fields = at.fields(*_TLS_CONTEXT) if at is not None else None
    if at is None or fields is None:
        return ""
    secret_at = fields.require("secret", "name the secret that holds the certificates")
    secret = secret_at.fields("namespace", "name") if secret_at is not None else None
    if secret is not None:
        secret.require("name", "the name of the secret")
    return canonical(at.plain())


def _listener(entry: Fields, place: Place) -> tuple[str, int] | None:
    at = entry.get("listener")
    fields = at.fields("envoyConfig", "name", "priority") if at is not None else None
    if at is None or fields is None:
        return None
    config_at = fields.require("envoyConfig", "the resource that defines the listener")
    config = config_at.fields("kind", "name") if config_at is not None else None
    kind = config.text("kind") if config is not None else None
    if config is not None and kind and kind not in _ENVOY_KINDS:
        config.at.error(f"kind {one_of(_ENVOY_KINDS, kind)}")
    if place.direction is Direction.INGRESS:
        at.error("a listener is not possible on ingress; move it to the egress of the client")
    priority_at = fields.get("priority")
    priority = (priority_at.integer() if priority_at is not None else None) or 0
    if priority_at is not None and not 0 <= priority <= _MAX_PRIORITY:
        priority_at.error(f"priority {priority} is not within 0..{_MAX_PRIORITY}")
    return canonical([fields.text("name"), config_at.plain() if config_at else None]), priority
