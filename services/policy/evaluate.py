"""Cases judged offline: the same reading, resolution and compilation as in a running cluster.

Case --accept--> policies --Resolver--> LocalPolicy --compile--> answers --> a word per probe
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pyroaring import BitMap

from identity.labels import FQDN, Labels
from identity.labels import Invalid as InvalidLabels
from identity.numbers import NumericIdentity
from services.policy.cases import (
    Case,
    CaseIdentity,
    CaseResult,
    CaseSubject,
    PolicyResult,
    SubjectResult,
    port_names,
)
from services.policy.clauses import (
    FIRST_CLAUSE_RULE,
    Direction,
    LocalPolicy,
    NamedPort,
    PolicyRef,
    RuleId,
)
from services.policy.compile import Answer, PortAnswer, Verdict, compile_direction
from services.policy.conflicts import conflict
from services.policy.features import Dialect, Features
from services.policy.fqdn import label_of, name_matches
from services.policy.l7 import Auth
from services.policy.model import FqdnPeer, Policy
from services.policy.parse import parse_object
from services.policy.requirements import has_requirements, narrowed
from services.policy.resolve import Resolver, ResolverSettings, rule_count
from services.runtime.errors import Invalid

LAST_IDENTITY = (1 << 32) - 1
_DIRECTIONS = {"ingress": Direction.INGRESS, "egress": Direction.EGRESS}


def evaluate(case: Case, dialect: Dialect = Dialect.TESSERA) -> CaseResult:
    """Invalid policies are left out of it, as a cluster would. Raises Invalid for a broken case."""
    accepted, results = _accept(case, dialect)
    try:
        world = World.of(case, accepted)
        subjects = tuple(_judge(world, subject) for subject in case.subjects or ())
    except (InvalidLabels, ValueError) as fault:
        raise Invalid(f"case {case.name!r}: {fault}") from fault
    return CaseResult(case.name, results, subjects)


def _accept(case: Case, dialect: Dialect) -> tuple[list[Policy], tuple[PolicyResult, ...]]:
    policies, results = [], []
    for number, given in enumerate(case.policies or ()):
        value = given.get("object", given) if isinstance(given, dict) else given
        source = f"policies[{number}]"
        policy, problems = parse_object(value, source, "default", Features.ALL, dialect)
        if policy is None:
            fault = next(one for one in problems if one.severity == "error")
            error = f"{fault.path}: {fault.message}" if fault.path else fault.message
            results.append(PolicyResult(valid=False, error=error))
            continue
        results.append(PolicyResult(valid=True))
        # Two objects of one name are two policies here.
        name = f"{policy.ref.name}#{number}"
        ref = PolicyRef(policy.ref.kind, policy.ref.namespace, name)
        policies.append(replace(policy, ref=ref))
    return policies, tuple(results)


@dataclass(frozen=True, slots=True)
class World:
    """What a case says exists."""

    case: Case
    policies: Sequence[Policy]
    labels: Mapping[NumericIdentity, Labels]
    resolver: Resolver
    egress_names: Mapping[NamedPort, int]

    @classmethod
    def of(cls, case: Case, policies: Sequence[Policy]) -> World:
        for identity in case.identities or ():
            if not 0 < identity.id <= LAST_IDENTITY:
                raise ValueError(f"identity {identity.id} is not within 1..{LAST_IDENTITY}")
        labels = {NumericIdentity(i.id): _labels(case, i, policies) for i in case.identities or ()}
        resolver = _resolver(case, policies, labels)
        return cls(case, policies, labels, resolver, port_names(case.egress_named_ports))

    def resolver_of(self, subject: NumericIdentity) -> Resolver:
        """A resolver of the subject's own where requirements bind the policies to it."""
        if subject not in self.labels or not has_requirements(self.policies):
            return self.resolver
        own = narrowed(self.policies, self.labels[subject])
        return _resolver(self.case, own, self.labels)


def _resolver(
    case: Case, policies: Iterable[Policy], labels: Mapping[NumericIdentity, Labels]
) -> Resolver:
    settings = ResolverSettings(
        allow_localhost=case.allow_localhost, enforcement=case.enforcement_mode or "default"
    )
    resolver = Resolver(settings)
    inside = {NumericIdentity(i.id) for i in case.identities or () if not i.prefix}
    resolver.set_identities({number: labels[number] for number in inside})
    for identity in case.identities or ():
        number = NumericIdentity(identity.id)
        if identity.prefix:
            resolver.place(number, identity.prefix, labels[number])
        elif identity.addresses:
            resolver.set_addresses(number, identity.addresses)
    base = int(FIRST_CLAUSE_RULE)
    for policy in policies:
        resolver.set_policy(policy, RuleId(base))
        base += rule_count(policy)
    return resolver


def _labels(case: Case, identity: CaseIdentity, policies: Iterable[Policy]) -> Labels:
    """As given, but which names an address was learnt for follows from `dns`."""
    written = Labels.parse(identity.labels or ())
    if not identity.prefix:
        return written
    network = ipaddress.ip_network(identity.prefix, strict=False)
    names = (case.dns or {}).get(str(network.network_address))
    if not names or network.num_addresses > 1:
        return written
    labels = written.keep(lambda label: label.source != FQDN)
    for pattern in sorted(_patterns(policies)):
        if any(name_matches(pattern, name) for name in names):
            labels = labels.with_label(label_of(pattern))
    return labels


def _patterns(policies: Iterable[Policy]) -> set[str]:
    return {
        peer.pattern
        for policy in policies
        for rule in policy.rules
        for clause in rule.clauses
        for peer in clause.peers or ()
        if isinstance(peer, FqdnPeer)
    }


# ------------------------------------------------------------------ probes


@dataclass(frozen=True, slots=True)
class _Probe:
    direction: Direction
    peer: NumericIdentity
    proto: int
    port: int


def _judge(world: World, subject: CaseSubject) -> SubjectResult:
    identity = NumericIdentity(subject.id)
    probes = [_probe(given) for given in subject.probes or ()]
    resolver = world.resolver_of(identity)
    if not resolver.knows(identity):
        fault = f"identity {identity} is not among the identities of the case"
        return SubjectResult(subject.id, False, False, fault, ("deny",) * len(probes))
    local = resolver.local_policy(identity)
    fault = conflict(local)
    if fault:
        verdicts = ("deny",) * len(probes)
    else:
        names = {
            Direction.INGRESS: port_names(subject.named_ports),
            Direction.EGRESS: world.egress_names,
        }
        verdicts = _verdicts(resolver, local, probes, names)
    enforced = local.ingress_enforced, local.egress_enforced
    return SubjectResult(subject.id, *enforced, fault or None, verdicts)


def _verdicts(
    resolver: Resolver,
    local: LocalPolicy,
    probes: Sequence[_Probe],
    names: Mapping[Direction, Mapping[NamedPort, int]],
) -> tuple[str, ...]:
    answers: dict[tuple[Direction, NumericIdentity], Answer] = {}
    for direction in Direction:
        compiled = compile_direction(local, direction, names[direction])
        peers = BitMap(probe.peer for probe in probes if probe.direction is direction)
        if compiled is None:
            continue
        parts = compiled.partition(lambda group: resolver.group(group).members, peers)
        for answer, members in parts.items():
            answers.update(((direction, NumericIdentity(peer)), answer) for peer in members)
    found = []
    for probe in probes:
        at = answers.get((probe.direction, probe.peer))
        found.append("allow" if at is None else word_of(at.lookup(probe.proto, probe.port)))
    return tuple(found)


def word_of(answer: PortAnswer) -> str:
    """allow, deny, redirect or auth:<mode>."""
    if answer.verdict in (Verdict.NONE, Verdict.DENY):
        return "deny"
    if answer.auth is not Auth.DISABLED:
        return f"auth:{answer.auth}"
    return "redirect" if answer.verdict is Verdict.REDIRECT else "allow"


def _probe(given: Sequence[object]) -> _Probe:
    match given:
        case [str(side), int(peer), int(proto), int(port), *_] if (
            side in _DIRECTIONS and 0 <= peer <= LAST_IDENTITY
        ):
            return _Probe(_DIRECTIONS[side], NumericIdentity(peer), proto, port)
        case _:
            raise ValueError(
                f"probe {list(given)} is not [ingress or egress, peer identity, protocol, port]"
            )
