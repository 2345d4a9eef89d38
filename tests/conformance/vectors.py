"""Recorded verdicts: reading them, and asking this implementation the same questions.

A case is `covered` when every policy in it was accepted, `outside` when one was refused because
something is not supported yet. Whatever is covered must agree.
"""

from __future__ import annotations

import ipaddress
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pyroaring import BitMap

from identity.labels import Labels
from identity.numbers import WORLD, WORLD_IPV4, WORLD_IPV6, NumericIdentity
from services.policy.cilium import read_rule
from services.policy.clauses import Direction, PolicyRef, RuleId
from services.policy.compile import Answer, Compiled, Verdict, compile_direction
from services.policy.model import Policy, Rule
from services.policy.parse import parse
from services.policy.reader import Cursor, Problem, Report
from services.policy.resolve import Resolver, ResolverSettings, rule_count
from services.policy.selectors import Scope
from services.policy.tree import documents

VECTORS = Path(__file__).parents[2].parent / "shared" / "vectors" / "policy"
OUTSIDE = ("not supported",)
DIRECTIONS = {"ingress": Direction.INGRESS, "egress": Direction.EGRESS}
VERDICTS = {Verdict.ALLOW: "allow", Verdict.DENY: "deny", Verdict.NONE: "deny"}


def load(name: str) -> Any:
    path = VECTORS / f"{name}.json"
    if not path.exists():
        pytest.skip(f"no vectors at {path}")
    return json.loads(path.read_text())


def without(node: Any, removed: tuple[str, ...]) -> Any:
    """The same tree without these keys, wherever they stand."""
    if isinstance(node, dict):
        return {key: without(value, removed) for key, value in node.items() if key not in removed}
    return [without(item, removed) for item in node] if isinstance(node, list) else node


@dataclass
class Tally:
    """Counts per vector file, printed by the tests."""

    name: str
    agree: int = 0
    outside: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    probes: int = 0
    # Single probes that differ by intent in cases that agree otherwise.
    differing: Counter[str] = field(default_factory=Counter)

    def report(self) -> None:
        total = self.agree + self.outside.total() + self.known.total() + len(self.wrong)
        print(
            f"\n{self.name}: {total} cases, {self.agree} agree ({self.probes} probes),"
            f" {self.outside.total()} outside, {self.known.total()} differ by intent,"
            f" {len(self.wrong)} disagree"
        )
        for reason, count in (self.outside + self.known + self.differing).most_common():
            print(f"  {count:5d}  {reason}")
        assert not self.wrong, "\n".join(self.wrong[:20])


@dataclass(frozen=True)
class Refused(Exception):
    problems: tuple[Problem, ...]

    @property
    def outside(self) -> str | None:
        """Why it is outside of what is supported; None when it is refused for good."""
        for problem in self.problems:
            if any(word in problem.message for word in OUTSIDE):
                return problem.message.split(";")[0]
        return None


def accept(document: Mapping[str, Any]) -> Policy:
    parsed = parse(json.dumps(document).encode(), "vector", "default")
    errors = tuple(p for p in parsed.problems if p.severity == "error")
    if errors:
        raise Refused(errors)
    return parsed.policies[0].policy


def accept_rules(rules: Iterable[Mapping[str, Any]]) -> Policy:
    """Bare rules: selectors are taken as they are."""
    return Policy(PolicyRef("Rules", "", "bare"), tuple(accept_rule(rule) for rule in rules))


def accept_rule(rule: Mapping[str, Any]) -> Rule:
    (document,) = documents(json.dumps(rule))
    report = Report("vector")
    read = read_rule(Cursor(report, "", document.root, document.root.place), Scope(None, bare=True))
    errors = tuple(p for p in report.problems if p.severity == "error")
    if errors or read is None:
        raise Refused(errors)
    return read


@dataclass
class World:
    """A resolver filled from a case."""

    resolver: Resolver
    dual_stack: bool = False
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
    ) -> World:
        resolver = Resolver(settings)
        resolver.set_identities(identities)
        base = 16
        for n, policy in enumerate(policies):
            ref = PolicyRef(policy.ref.kind, policy.ref.namespace, f"{policy.ref.name}-{n}")
            resolver.set_policy(Policy(ref, policy.rules), RuleId(base))
            base += rule_count(policy)
        return cls(resolver, dual_stack)

    def verdict(
        self,
        subject: NumericIdentity,
        direction: Direction,
        peer: NumericIdentity,
        proto: int,
        port: int,
    ) -> Verdict:
        at = (subject, direction)
        if at not in self.compiled:
            self.compiled[at] = compile_direction(self.resolver.local_policy(subject), direction)
        compiled = self.compiled[at]
        if compiled is None:
            return Verdict.ALLOW
        key = (*at, peer)
        if key not in self.answers:
            self.answers[key] = self._answer(compiled, peer)
        return self.answers[key].lookup(proto, port).verdict

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


def row_verdict(
    rows: Iterable[tuple[int, int, int, int, str]], peer: int, proto: int, port: int
) -> str:
    """What a recorded map (identity, proto, port, prefix length, verdict) answers."""
    best: dict[int, tuple[int, str]] = {}
    for identity, row_proto, row_port, bits, verdict in rows:
        fits = row_proto in (0, proto) and row_port >> (16 - bits) == port >> (16 - bits)
        if identity in (0, peer) and fits:
            length = (8 if row_proto else 0) + bits
            if identity not in best or length > best[identity][0]:
                best[identity] = (length, verdict)
    said = {verdict for _, verdict in best.values()}
    if "deny" in said or not said:
        return "deny"
    return "allow"
