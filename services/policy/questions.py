"""Whether and why a connection passes, both ends together, over any resolver.

source, target --identity numbers--> egress of the source, ingress of the target
└─ an end that is no endpoint says nothing
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from identity.labels import RESERVED
from identity.numbers import HOST, WORLD, NumericIdentity, reserved_labels
from services.policy.blocks import PortAnswer, Verdict
from services.policy.cases import PROTOCOLS
from services.policy.clauses import RULE_ALLOW_LOCALHOST, Direction
from services.policy.compile import Answer, Compiled, PortNames, compile_direction
from services.policy.conflicts import conflict
from services.policy.evaluate import word_of
from services.policy.explain import Asked, Reason, explain
from services.policy.peers import contains
from services.policy.prefixes import Network
from services.policy.requests import Request, passes
from services.policy.resolve import Resolver
from services.runtime.errors import Invalid

_HOST_LET_IN = PortAnswer(Verdict.ALLOW, RULE_ALLOW_LOCALHOST)


@dataclass(frozen=True, slots=True, order=True)
class Ports:
    """What is asked for at the destination."""

    proto: int
    port: int

    @classmethod
    def parse(cls, text: str) -> Ports:
        """`8080`, `8080/TCP`, `53/UDP`, `8/ICMP`. Raises Invalid."""
        number, _, word = text.partition("/")
        known = {name.lower(): proto for name, proto in PROTOCOLS.items()}
        proto = known.get(word.lower() or "tcp")
        digits = number.isascii() and number.isdigit() and len(number) <= 5
        if proto is None or not digits or int(number) > 65535:
            raise Invalid(f"port {text!r} is not written like 8080/TCP, 53/UDP or 8/ICMP")
        return cls(proto, int(number))

    def __str__(self) -> str:
        names = {proto: name for name, proto in PROTOCOLS.items()}
        return f"{self.port}/{names.get(self.proto, self.proto)}"


class World(Protocol):
    """Who is who. `identity` raises NotFound for a text that names nobody."""

    @property
    def resolver(self) -> Resolver: ...

    def identity(self, text: str) -> NumericIdentity: ...

    def is_endpoint(self, number: NumericIdentity) -> bool: ...

    def port_names(self, number: NumericIdentity, direction: Direction) -> PortNames: ...

    @property
    def host_let_in(self) -> bool:
        """Whether nodes let their own host in, where the resolver does not say so itself."""


@dataclass(slots=True)
class Questions:
    """Keeps what it compiled: for a world that does not change meanwhile."""

    world: World
    _compiled: dict[tuple[NumericIdentity, Direction], Compiled | None] = field(
        default_factory=dict
    )
    _answers: dict[tuple[NumericIdentity, Direction], dict[int, Answer]] = field(
        default_factory=dict
    )
    _conflicts: dict[NumericIdentity, str] = field(default_factory=dict)

    def explain(
        self, source: str, target: str, ports: Ports, request: Request | None = None
    ) -> tuple[Reason, ...]:
        """Egress of the source, ingress of the target; of a proxied connection, whether `request`
        would be let through."""
        reasons = map(self._explain, self._ends(source, target, ports))
        return tuple(reason if request is None else _asked(reason, request) for reason in reasons)

    def verdict(self, source: str, target: str, ports: Ports) -> str:
        """allow, deny, redirect or auth:<mode> of the connection, both ends together."""
        return together([self._word(asked) for asked in self._ends(source, target, ports)])

    def conflict(self, subject: NumericIdentity) -> str:
        """What cannot be enforced together on it; empty when all can."""
        return conflict(self.world.resolver.local_policy(subject))

    def _ends(self, source: str, target: str, ports: Ports) -> Iterator[Asked]:
        one, other = self.world.identity(source), self.world.identity(target)
        if self.world.is_endpoint(one):
            yield Asked(Direction.EGRESS, one, other, ports.proto, ports.port)
        if self.world.is_endpoint(other):
            yield Asked(Direction.INGRESS, other, one, ports.proto, ports.port)

    def _explain(self, asked: Asked) -> Reason:
        names = self.world.port_names(asked.subject, asked.direction)
        reason = explain(self.world.resolver, asked, names)
        if self._is_own_host(asked, reason.answer):
            words = "the node reaches its own endpoints, unless its allow_localhost is off"
            return replace(reason, answer=_HOST_LET_IN, words=words, policies=(), misses=())
        return reason

    def _word(self, asked: Asked) -> str:
        at = (asked.subject, asked.direction)
        if at not in self._compiled:
            self._compile(*at)
        compiled = self._compiled[at]
        if self._conflicts[asked.subject]:
            return "deny"
        if compiled is None:
            return "allow"
        answer = self._answers[at].get(asked.peer, compiled.default)
        found = answer.lookup(asked.proto, asked.port)
        return "allow" if self._is_own_host(asked, found) else word_of(found)

    def _is_own_host(self, asked: Asked, answer: PortAnswer) -> bool:
        """No clause speaks of it, so the node's own setting does."""
        asks = asked.peer == HOST and asked.direction is Direction.INGRESS
        return asks and self.world.host_let_in and answer.verdict is Verdict.NONE

    def _compile(self, subject: NumericIdentity, direction: Direction) -> None:
        resolver = self.world.resolver
        local = resolver.local_policy(subject)
        self._conflicts[subject] = conflict(local)
        names = self.world.port_names(subject, direction)
        compiled = compile_direction(local, direction, names)
        self._compiled[subject, direction] = compiled
        parts = (
            {}
            if compiled is None
            else compiled.partition(lambda group: resolver.group(group).members)
        )
        self._answers[subject, direction] = {
            peer: answer for answer, held in parts.items() for peer in held
        }


def _asked(reason: Reason, request: Request) -> Reason:
    found = passes(reason.answer.proxy, request)
    if reason.answer.verdict is not Verdict.REDIRECT or found is None:
        return reason
    words = f"the proxy {'lets' if found else 'does not let'} {request} through"
    return replace(reason, request_passes=found, words=f"{reason.words}; {words}")


def together(words: list[str]) -> str:
    """What both ends make of it: the strictest of them."""
    for word in ("deny", *sorted(w for w in words if w.startswith("auth:")), "redirect"):
        if word in words:
            return word
    return "allow"


def reserved_named(text: str) -> NumericIdentity | None:
    """`world`, `host`, `remote-node` and so on."""
    for number, labels in reserved_labels().items():
        if text in {label.key for label in labels if label.source == RESERVED and len(labels) == 1}:
            return number
    return None


def outside(resolver: Resolver, network: Network) -> NumericIdentity:
    """Of an address that nobody in the cluster has: the longest prefix that a policy names."""
    best = (-1, WORLD)
    for text, number in resolver.prefixes().items():
        known = ipaddress.ip_network(text)
        if contains(known, network):
            best = max(best, (known.prefixlen, number))
    return best[1]
