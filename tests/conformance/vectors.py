"""Recorded verdicts: reading them, and asking this implementation the same questions.

`excepted` names the cases that differ on purpose, with the reason; everything else must agree.
"""

from __future__ import annotations

import ipaddress
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from pyroaring import BitMap

from identity.labels import Labels
from identity.numbers import WORLD, WORLD_IPV4, WORLD_IPV6, NumericIdentity
from services.policy.cilium import read_rule
from services.policy.clauses import Direction, PolicyRef, RuleId
from services.policy.compile import Answer, Compiled, PortNames, compile_direction
from services.policy.evaluate import word_of
from services.policy.features import Dialect, Features
from services.policy.model import Policy, Rule
from services.policy.parse import parse, parse_object
from services.policy.reader import Cursor, Problem, Report
from services.policy.requirements import narrowed
from services.policy.resolve import Resolver, ResolverSettings, rule_count
from services.policy.selectors import Scope
from services.policy.tree import documents

VECTORS = Path(__file__).parents[2].parent / "shared" / "vectors" / "policy"
DIRECTIONS = {"ingress": Direction.INGRESS, "egress": Direction.EGRESS}


def load(name: str) -> Any:
    path = VECTORS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no vectors at {path}")
    return json.loads(path.read_text())


@dataclass
class Tally:
    """Counts per vector file, printed by the tests."""

    name: str
    agree: int = 0
    excepted: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    probes: int = 0

    def report(self) -> None:
        total = self.agree + self.excepted.total() + len(self.wrong)
        print(
            f"\n{self.name}: {total} cases, {self.agree} agree ({self.probes} probes),"
            f" {self.excepted.total()} differ on purpose, {len(self.wrong)} disagree"
        )
        for reason, count in self.excepted.most_common():
            print(f"  {count:5d}  {reason}")
        assert not self.wrong, "\n".join(self.wrong[:20])


@dataclass(frozen=True)
class Refused(Exception):
    problems: tuple[Problem, ...]


def accept_in(dialect: Dialect, document: Mapping[str, Any]) -> Policy:
    policy, problems = parse_object(document, "vector", "default", Features.ALL, dialect)
    if policy is None:
        raise Refused(problems)
    return policy


def accept(document: Mapping[str, Any]) -> Policy:
    parsed = parse(json.dumps(document).encode(), "vector", "default", Features.ALL)
    errors = tuple(p for p in parsed.problems if p.severity == "error")
    if errors:
        raise Refused(errors)
    return parsed.policies[0].policy


def accept_rules(rules: Iterable[Mapping[str, Any]]) -> Policy:
    """Bare rules: selectors are taken as they are."""
    return Policy(PolicyRef("Rules", "", "bare"), tuple(accept_rule(rule) for rule in rules))


def accept_rule(rule: Mapping[str, Any], features: Features = Features.ALL) -> Rule:
    (document,) = documents(json.dumps(rule))
    report = Report("vector", features)
    read = read_rule(Cursor(report, "", document.root, document.root.place), Scope(None, bare=True))
    errors = tuple(p for p in report.problems if p.severity == "error")
    if errors or read is None:
        raise Refused(errors)
    return read


def every_icmp_type(node: Any) -> Any:
    """With each IPv4 ICMP type 0 replaced by all types, which is how 1.17 reads it."""
    if isinstance(node, list):
        return [every_icmp_type(each) for each in node]
    if not isinstance(node, dict):
        return node
    widened = {key: every_icmp_type(value) for key, value in node.items()}
    if isinstance(lists := node.get("icmps"), list):
        widened["icmps"] = [wide for each in lists for wide in _wide(each)]
    return widened


def _wide(entry: Any) -> list[Any]:
    fields = entry.get("fields", [])
    if not any(map(_is_type_0, fields)):
        return [entry]
    rest = [one for one in fields if not _is_type_0(one)]
    every = [{"type": number} for number in range(256)]
    # A list holds 40 at most.
    return [{"fields": part} for n in range(0, 256, 40) if (part := every[n : n + 40])] + (
        [{"fields": rest}] if rest else []
    )


def _is_type_0(one: Any) -> bool:
    return one.get("family", "IPv4") == "IPv4" and one.get("type") in (0, "0", "EchoReply")


@dataclass
class World:
    """A resolver filled from a case."""

    resolver: Resolver
    dual_stack: bool = False
    names: PortNames = field(default_factory=dict)
    compiled: dict[tuple[NumericIdentity, Direction], Compiled | None] = field(default_factory=dict)
    answers: dict[tuple[NumericIdentity, Direction, NumericIdentity], Answer] = field(
        default_factory=dict
    )

    @classmethod
    def of(
        cls,
        policies: Iterable[Policy],
        identities: Mapping[NumericIdentity, Labels],
        settings: ResolverSettings,
        *,
        dual_stack: bool = False,
        names: PortNames | None = None,
        subject: Labels | None = None,
    ) -> World:
        """With `subject`, for this subject only: requirements bind to it."""
        if subject is not None:
            policies = narrowed(policies, subject)
        resolver = Resolver(settings)
        resolver.set_identities(identities)
        base = 16
        for n, policy in enumerate(policies):
            ref = PolicyRef(policy.ref.kind, policy.ref.namespace, f"{policy.ref.name}-{n}")
            resolver.set_policy(replace(policy, ref=ref), RuleId(base))
            base += rule_count(policy)
        return cls(resolver, dual_stack, names or {})

    def verdict(
        self,
        subject: NumericIdentity,
        direction: Direction,
        peer: NumericIdentity,
        proto: int,
        port: int,
    ) -> str:
        """allow, deny, redirect or auth:<mode>."""
        at = (subject, direction)
        if at not in self.compiled:
            local = self.resolver.local_policy(subject)
            self.compiled[at] = compile_direction(local, direction, self.names)
        compiled = self.compiled[at]
        if compiled is None:
            return "allow"
        key = (*at, peer)
        if key not in self.answers:
            self.answers[key] = self._answer(compiled, peer)
        return word_of(self.answers[key].lookup(proto, port))

    def _answer(self, compiled: Compiled, peer: NumericIdentity) -> Answer:
        (answer,) = compiled.partition(
            lambda group: self.resolver.group(group).members, BitMap([peer])
        )
        return answer

    def of_prefix(self, prefix: str) -> NumericIdentity:
        """The identity that an address of the prefix has here."""
        wanted = ipaddress.ip_network(prefix)
        best: tuple[int, NumericIdentity] = (-1, self._world(wanted.version))
        for text, number in self.resolver.prefixes().items():
            network = ipaddress.ip_network(text)
            if (
                network.version == wanted.version
                and network.prefixlen <= wanted.prefixlen
                and wanted.network_address in network
            ):
                best = max(best, (network.prefixlen, number))
        return best[1]

    def _world(self, version: int) -> NumericIdentity:
        if not self.dual_stack:
            return WORLD
        return WORLD_IPV4 if version == 4 else WORLD_IPV6


Row = tuple[int, int, int, int, str]


def row_verdict(rows: Iterable[Row], peer: int, proto: int, port: int) -> str:
    """What a recorded map (identity, proto, port, prefix length, verdict) answers."""
    best: dict[int, tuple[int, str]] = {}
    for identity, row_proto, row_port, bits, verdict in rows:
        fits = row_proto in (0, proto) and row_port >> (16 - bits) == port >> (16 - bits)
        if identity in (0, peer) and fits:
            length = (8 if row_proto else 0) + bits
            if identity not in best or length > best[identity][0]:
                best[identity] = (length, verdict)
    if not best:
        return "deny"
    if any(verdict == "deny" for _, verdict in best.values()):
        return "deny"
    # A row for a port before one for a protocol before any; the peer's own before anyone's.
    own, anyone = best.get(peer, (-1, "")), best.get(0, (-1, ""))
    return own[1] if min(own[0], 9) >= min(anyone[0], 9) else anyone[1]
