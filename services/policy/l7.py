"""What a proxy is asked to check: the L7 part of a clause, and the merged part of an answer.

    clause: ProxyRule(http, GET /a) --+
    clause: no L7 part ---------------+--merge--> ProxySet(http, any | GET /a), one stable digest
    clause: ProxyRule(http, GET /b) --+

Rules are canonical JSON texts, so that they compare, sort and hash. Which clauses match is decided
elsewhere; here their L7 parts are only put together.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

HTTP: Final = "http"
KAFKA: Final = "kafka"
DNS: Final = "dns"
TLS: Final = "tls"
LISTENER: Final = "crd"

# Listener priorities; the lower number wins where two listeners claim one connection.
DEFAULT_PRIORITIES: Final = {HTTP: 101, KAFKA: 106, TLS: 116, DNS: 121, LISTENER: 126}
_OTHER_PRIORITY: Final = 101


class Auth(IntEnum):
    """Modes of authentication, the stronger the higher."""

    DISABLED = 0
    SPIRE = 1
    ALWAYS_FAIL = 2

    def __str__(self) -> str:
        return ("disabled", "spire", "test-always-fail")[self]


@dataclass(frozen=True, slots=True, order=True)
class ProxyRule:
    """The L7 part of one toPorts entry.

    rules: empty means any request. `parser` is http, kafka, dns, tls, crd (a listener by name) or
    the name of a generic protocol.
    """

    parser: str
    rules: tuple[str, ...] = ()
    server_names: tuple[str, ...] = ()
    terminating: str = ""
    originating: str = ""
    listener: str = ""
    priority: int = 0

    @property
    def digest(self) -> str:
        """16 hex digits, the same wherever the same rule is read."""
        content = [
            self.parser,
            list(self.rules),
            list(self.server_names),
            self.terminating,
            self.originating,
            self.listener,
            self.priority,
        ]
        return _digest(content)

    @property
    def rank(self) -> int:
        return self.priority or DEFAULT_PRIORITIES.get(self.parser, _OTHER_PRIORITY)


@dataclass(frozen=True, slots=True, order=True)
class ProxyPart:
    """What one parser is asked. `any_request`: some clause lets every request through."""

    parser: str
    rules: tuple[str, ...]
    any_request: bool
    server_names: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, order=True)
class ProxySet:
    """Empty: no proxy. `rank`: the strongest listener priority in it."""

    parts: tuple[ProxyPart, ...] = ()
    rank: int = field(default=0, compare=False)

    def __bool__(self) -> bool:
        return bool(self.parts)

    @property
    def digest(self) -> str:
        """16 hex digits, the same wherever and whenever the same set is merged."""
        parts = [
            [p.parser, list(p.rules), p.any_request, list(p.server_names), list(p.contexts)]
            for p in self.parts
        ]
        return _digest(parts)


NO_PROXY: Final = ProxySet()


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _digest(content: object) -> str:
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:16]


def merge(rules: Iterable[ProxyRule | None]) -> ProxySet:
    """The L7 parts of all matching allow clauses, None for one without; NO_PROXY if all are."""
    by_parser: defaultdict[str, list[ProxyRule]] = defaultdict(list)
    plain = False
    for rule in rules:
        if rule is None:
            plain = True
        else:
            by_parser[rule.parser].append(rule)
    if not by_parser:
        return NO_PROXY
    parts = tuple(_part(parser, held, plain=plain) for parser, held in sorted(by_parser.items()))
    return ProxySet(parts, min(rule.rank for held in by_parser.values() for rule in held))


def _part(parser: str, held: list[ProxyRule], *, plain: bool) -> ProxyPart:
    contexts = {text for r in held for text in (r.terminating, r.originating, r.listener) if text}
    return ProxyPart(
        parser,
        tuple(sorted({text for rule in held for text in rule.rules})),
        plain or any(not rule.rules for rule in held),
        tuple(sorted({name for rule in held for name in rule.server_names})),
        tuple(sorted(contexts)),
    )


def joined(one: str, other: str) -> str | None:
    """The parser that two clauses about the same ports share; None: they cannot share a port.

    "" stands for no parser. Anything but DNS and named listeners may follow a TLS inspection.
    """
    if one == other or not other:
        return one
    if not one:
        return other
    if one in (DNS, LISTENER) or other in (DNS, LISTENER):
        return None
    if one == TLS:
        return other
    return one if other == TLS else None
