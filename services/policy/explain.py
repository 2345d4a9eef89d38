"""Why one end of a connection says what it says.

    LocalPolicy --compile--> the answer --+
    its clauses --which match?--> deciders+--> Reason: clauses, or default deny and because of whom
    those that almost match ---------------> Misses: "port 8080 is allowed, you asked 8081"

The answer is the compiler's, as the datapath gets it; the clauses are found again one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pyroaring import BitMap

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.policy.blocks import PortAnswer, Verdict
from services.policy.clauses import (
    RULE_ALLOW_LOCALHOST,
    RULE_CONTROL_CHANNEL,
    RULE_DEFAULT_ALLOW,
    RULE_OPEN,
    Action,
    Clause,
    Direction,
    LocalPolicy,
    PolicyRef,
    PortRange,
    RuleId,
    RuleSource,
    Tier,
)
from services.policy.compile import PortNames, compile_direction, numbered
from services.policy.conflicts import conflict
from services.policy.groups import GroupDef
from services.policy.residents import ByAddress
from services.policy.resolve import Resolver

MAX_MISSES = 3
_OPEN_ANSWER = PortAnswer(Verdict.ALLOW, RULE_OPEN)
_RESERVED: Mapping[RuleId, str] = {
    RULE_OPEN: "open: nothing restricts it",
    RULE_ALLOW_LOCALHOST: "traffic from the local host is allowed",
    RULE_CONTROL_CHANNEL: "the control channel is never stopped",
    RULE_DEFAULT_ALLOW: "the policies that select the endpoint do not turn default deny on",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One packet at one end. `port`: the destination's; of ICMP the type."""

    direction: Direction
    subject: NumericIdentity
    peer: NumericIdentity
    proto: int
    port: int


@dataclass(frozen=True, slots=True)
class Miss:
    """A clause that would have allowed it but for `lacks`."""

    source: RuleSource | None
    lacks: str


@dataclass(frozen=True, slots=True)
class Reason:
    """deciders: without all of them the answer would be another one; none of default answers.

    policies: those that restrict the direction. misses: the nearest first, where it is denied.
    request_passes: whether a proxy lets the request through that was asked about; None: none was.
    """

    asked: Asked
    answer: PortAnswer
    words: str
    deciders: tuple[RuleSource, ...]
    policies: tuple[PolicyRef, ...]
    misses: tuple[Miss, ...]
    request_passes: bool | None = None

    @property
    def passes(self) -> bool:
        return self.answer.verdict in (Verdict.ALLOW, Verdict.REDIRECT)


def explain(resolver: Resolver, asked: Asked, names: PortNames | None = None) -> Reason:
    """Raises NotFound for a subject that is not known."""
    local = resolver.local_policy(asked.subject)
    ingress = asked.direction is Direction.INGRESS
    policies = local.ingress_policies if ingress else local.egress_policies
    answer = answer_of(resolver, local, asked, names or {})
    clauses = list(_clauses(local, asked.direction, names or {}))
    rules = _deciding(resolver, clauses, asked, answer)
    found = (resolver.rule(rule) for rule in dict.fromkeys(rules))
    sources = tuple(source for source in found if source is not None)
    denied = answer.verdict in (Verdict.NONE, Verdict.DENY) and not sources
    misses = _misses(resolver, clauses, asked) if denied else ()
    words = conflict(local) or _words(answer, sources, policies)
    return Reason(asked, answer, words, sources, policies, misses)


def answer_of(resolver: Resolver, local: LocalPolicy, asked: Asked, names: PortNames) -> PortAnswer:
    """What the compiler makes of it."""
    compiled = compile_direction(local, asked.direction, names)
    if compiled is None:
        return _OPEN_ANSWER
    parts = compiled.partition(lambda g: resolver.group(g).members, BitMap([asked.peer]))
    (answer,) = parts
    return answer.lookup(asked.proto, asked.port)


def _words(answer: PortAnswer, sources: Sequence[RuleSource], policies: Sequence[PolicyRef]) -> str:
    if sources:
        verb = {Verdict.DENY: "denied", Verdict.REDIRECT: "sent to a proxy"}
        by = "; ".join(map(str, sources))
        return f"{verb.get(answer.verdict, 'allowed')} by {by}"
    if answer.verdict in (Verdict.ALLOW, Verdict.REDIRECT):
        return _RESERVED.get(answer.rule_id, "allowed")
    if policies:
        return f"default deny: selected by {', '.join(map(str, policies))}"
    return "default deny: every direction is enforced here"


# ------------------------------------------------------------------ clauses


def _clauses(local: LocalPolicy, direction: Direction, names: PortNames) -> Iterator[Clause]:
    for clause in local.clauses:
        if clause.direction is direction:
            yield from numbered(clause, names)


def _deciding(
    resolver: Resolver, clauses: Sequence[Clause], asked: Asked, answer: PortAnswer
) -> list[RuleId]:
    """The clauses that share the verdict with the one the answer names."""
    named = [c for c in clauses if c.rule_id == answer.rule_id]
    if not named or answer.rule_id in _RESERVED:
        return []
    if named[0].tier is not Tier.NETWORK_POLICY:
        return [answer.rule_id]
    matching = [
        clause
        for clause in clauses
        if clause.tier is Tier.NETWORK_POLICY
        and _has_port(clause, asked)
        and _has_peer(resolver, clause, asked)
    ]
    if answer.verdict is Verdict.DENY:
        return [clause.rule_id for clause in matching if clause.action is Action.DENY]
    if answer.verdict is Verdict.REDIRECT:
        return [clause.rule_id for clause in matching if clause.proxy is not None]
    return [clause.rule_id for clause in matching]


def _has_port(clause: Clause, asked: Asked) -> bool:
    return not clause.ports or any(
        ports.proto == asked.proto and ports.lo <= asked.port <= ports.hi for ports in clause.ports
    )


def _has_peer(resolver: Resolver, clause: Clause, asked: Asked) -> bool:
    groups = clause.groups
    return not groups or any(asked.peer in resolver.group(g).members for g in groups)


# ------------------------------------------------------------------ near misses


def _misses(resolver: Resolver, clauses: Sequence[Clause], asked: Asked) -> tuple[Miss, ...]:
    ranked = []
    for clause in clauses:
        if clause.action is not Action.ALLOW or clause.rule_id in _RESERVED:
            continue
        ports = (0, "") if _has_port(clause, asked) else _port_distance(clause, asked)
        peer = (
            (0, "")
            if _has_peer(resolver, clause, asked)
            else _peer_distance(resolver, clause, asked)
        )
        lacks = " and ".join(words for words in (ports[1], peer[1]) if words)
        if lacks:
            ranked.append((ports[0] + peer[0], clause.rule_id, lacks))
    found = dict.fromkeys((rule, lacks) for _, rule, lacks in sorted(ranked))
    return tuple(Miss(resolver.rule(rule), lacks) for rule, lacks in list(found)[:MAX_MISSES])


def _port_distance(clause: Clause, asked: Asked) -> tuple[int, str]:
    """How far off, and in words: another port is nearer than another protocol."""
    same = [ports for ports in clause.ports if ports.proto == asked.proto]
    nearest = min(
        same or clause.ports,
        key=lambda ports: min(abs(ports.lo - asked.port), abs(ports.hi - asked.port)),
    )
    asked_port = PortRange(asked.proto, asked.port, asked.port)
    words = f"{port_words(nearest)} is allowed, you asked {port_words(asked_port)}"
    return (1 if same else 2), words


def port_words(ports: PortRange) -> str:
    names = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}
    proto = names.get(ports.proto, f"protocol {ports.proto}")
    what = "type" if ports.proto in (1, 58) else "port"
    if (ports.lo, ports.hi) == (0, 65535):
        return f"any {proto} {what}"
    where = str(ports.lo) if ports.lo == ports.hi else f"{ports.lo}-{ports.hi}"
    return f"{proto} {what} {where}"


def _peer_distance(resolver: Resolver, clause: Clause, asked: Asked) -> tuple[int, str]:
    labels = resolver.labels(asked.peer) or Labels.EMPTY
    return min(
        _address_distance(resolver, resolver.definition(group), asked.peer)
        or _group_distance(resolver.definition(group), labels)
        for group in clause.groups
    )


def _address_distance(
    resolver: Resolver, group: GroupDef, peer: NumericIdentity
) -> tuple[int, str] | None:
    if group.by_address is ByAddress.NONE:
        return None
    inside, of_all = resolver.addresses_inside(group.id, peer)
    if not inside:
        return None
    lacks = f"{of_all - inside} of the peer's {of_all} addresses are not in {group.text}"
    return 3, f"{lacks}, and an identity is let in as a whole"


def _group_distance(group: GroupDef, labels: Labels) -> tuple[int, str]:
    """How many requirements the peer does not meet; more than any number where none would help."""
    if not group.selectors:
        return 100, f"the peer is not in {group.text}"
    unmet = min(
        (
            [r for r in selector.requirements if not r.matches(labels)]
            for selector in group.selectors
        ),
        key=len,
    )
    if len(group.selectors) > 1 or group.text.startswith("entity("):
        return 10 + len(unmet), f"the peer is not {group.text}"
    if len(unmet) == 1:
        return 1, f"label {unmet[0]} is missing"
    return len(unmet), f"labels {', '.join(map(str, unmet))} are missing"


def without(local: LocalPolicy, rules: Sequence[RuleId]) -> LocalPolicy:
    """The local policy as if these clauses had never been written, still enforced."""
    kept = tuple(clause for clause in local.clauses if clause.rule_id not in rules)
    return replace(local, clauses=kept)
