"""PolicyQuestions over gRPC: why a connection passes or not, and what candidates would change.

    Explain --the resolver in force-----------------------------> Reason per end
    Diff ----the identities asked about, and the policies that ---> two small resolvers --> changes
             select them, before and after                          (in a thread)

Names are taken from the addresses as they are shown to the nodes.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Final, TypeAlias

import grpc
import grpc.aio
from tessera_wire.policy.v1 import policy_pb2 as pb
from tessera_wire.policy.v1 import policy_pb2_grpc

from identity.labels import Labels
from identity.numbers import NumericIdentity, reserved_labels
from services.policy.clauses import Direction, PolicyRef, RuleId
from services.policy.compile import PortNames
from services.policy.diff import Change, Connection, Difference, difference
from services.policy.evaluate import word_of
from services.policy.explain import Reason
from services.policy.local import may_be_endpoint
from services.policy.model import Policy
from services.policy.parse import Parsed, parse
from services.policy.prefixes import Network
from services.policy.questions import Ports, Questions, outside, reserved_named, together
from services.policy.resolve import Resolver, ResolverSettings, rule_count
from services.policyd.problems import problem_to_wire
from services.policyd.state import State
from services.runtime.errors import Invalid, NotFound
from services.wire.convert import direction_to_wire, ref_from_wire, ref_to_wire, rule_to_wire

# A second of work in a thread, about.
MAX_CONNECTIONS: Final = 100_000
MAX_LISTED: Final = 1_000
WORLD: Final = "world"

_Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"
_NO_NAMES: Final[PortNames] = {}


class PolicyQuestions(policy_pb2_grpc.PolicyQuestionsServicer):
    def __init__(self, state: State) -> None:
        self._state = state

    def register(self, server: grpc.aio.Server) -> None:
        policy_pb2_grpc.add_PolicyQuestionsServicer_to_server(self, server)

    async def Explain(self, request: pb.ExplainRequest, context: _Context) -> pb.ExplainResponse:
        asked = _connection(request.connection)
        questions = Questions(Live(self._state))
        reasons = questions.explain(asked.source, asked.target, asked.ports)
        return pb.ExplainResponse(
            verdict=together([word_of(reason.answer) for reason in reasons]),
            ends=map(_end_to_wire, reasons),
            revision=self._state.revision,
        )

    async def Diff(self, request: pb.DiffRequest, context: _Context) -> pb.DiffResponse:
        parsed = await asyncio.to_thread(_parse, request)
        problems = [problem_to_wire(problem) for one in parsed for problem in one.problems]
        if any(one.refused for one in parsed):
            return pb.DiffResponse(problems=problems)
        candidates = [each.policy for one in parsed for each in one.policies]
        deleted = {ref_from_wire(ref) for ref in request.deleted}
        live = Live(self._state)
        connections = list(_connections(request, live))
        texts = {text for one in connections for text in (one.source, one.target)}
        ends = {text: live.named(text) for text in texts}
        plan = _plan(self._state, ends, connections, candidates, deleted)
        revision = self._state.revision
        found = await asyncio.to_thread(_difference, plan)
        return _difference_to_wire(found, problems, revision)

    async def Who(self, request: pb.WhoRequest, context: _Context) -> pb.WhoResponse:
        live = Live(self._state)
        number = live.identity(request.text)
        labels = live.resolver.labels(number) or reserved_labels().get(number, Labels.EMPTY)
        found = pb.WhoResponse(identity=number, labels=labels.strings())
        if live.is_endpoint(number):
            policy = live.resolver.local_policy(number)
            found.ingress_enforced = policy.ingress_enforced
            found.egress_enforced = policy.egress_enforced
            found.ingress_policies.extend(map(ref_to_wire, policy.ingress_policies))
            found.egress_policies.extend(map(ref_to_wire, policy.egress_policies))
        return found


# ------------------------------------------------------------------ who is who


class Live:
    """The cluster as this process sees it now."""

    host_let_in = True

    def __init__(self, state: State) -> None:
        self._state = state

    @property
    def resolver(self) -> Resolver:
        return self._state.resolver

    def identity(self, text: str) -> NumericIdentity:
        named = self.named(text)
        if named is not None:
            return named
        return outside(self.resolver, _network(text))

    def named(self, text: str) -> NumericIdentity | None:
        """None for an address that nobody here has. Raises NotFound."""
        rows = self._state.addresses.rows
        if text in rows and "/" not in text:
            return rows[text].identity
        if text.isascii() and text.isdecimal():
            number = NumericIdentity(int(text))
            if self.resolver.knows(number):
                return number
            raise NotFound(f"identity {text} is not in use")
        if (reserved := reserved_named(text)) is not None:
            return reserved
        namespace, slash, name = text.partition("/")
        for row in rows.values() if slash else ():
            if (row.namespace, row.name) == (namespace, name):
                return row.identity
        _network(text)
        return None

    def is_endpoint(self, number: NumericIdentity) -> bool:
        return may_be_endpoint(number) and self.resolver.knows(number)

    def port_names(self, number: NumericIdentity, direction: Direction) -> PortNames:
        return _NO_NAMES

    def everybody(self) -> Sequence[str]:
        """One name for each identity of an endpoint, and the world."""
        names: dict[NumericIdentity, str] = {}
        for row in self._state.addresses.rows.values():
            if row.name and self.is_endpoint(row.identity):
                name = f"{row.namespace}/{row.name}"
                names[row.identity] = min(name, names.get(row.identity, name))
        return [*sorted(names.values()), WORLD]


def _network(text: str) -> Network:
    with suppress(ValueError):
        return ipaddress.ip_network(text)
    raise NotFound(
        f"{text!r} is no endpoint (namespace/name), no reserved name, no identity and no address"
    )


# ------------------------------------------------------------------ before and after


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a difference depends on, as values."""

    settings: ResolverSettings
    connections: Sequence[Connection]
    ends: Mapping[str, NumericIdentity | None]
    labels: Mapping[NumericIdentity, Labels]
    addresses: Mapping[NumericIdentity, frozenset[str]]
    before: Sequence[tuple[Policy, RuleId]]
    after: Sequence[tuple[Policy, RuleId]]


@dataclass(frozen=True, slots=True)
class Planned:
    resolver: Resolver
    ends: Mapping[str, NumericIdentity | None]
    host_let_in = True

    def identity(self, text: str) -> NumericIdentity:
        number = self.ends[text]
        return outside(self.resolver, ipaddress.ip_network(text)) if number is None else number

    def is_endpoint(self, number: NumericIdentity) -> bool:
        return may_be_endpoint(number)

    def port_names(self, number: NumericIdentity, direction: Direction) -> PortNames:
        return _NO_NAMES


def _plan(
    state: State,
    ends: Mapping[str, NumericIdentity | None],
    connections: Sequence[Connection],
    candidates: Sequence[Policy],
    deleted: Set[PolicyRef],
) -> Plan:
    """`ends`: who is asked about; None for an address outside of the cluster."""
    resolver = state.resolver
    numbers = {number for number in ends.values() if number is not None}
    refs = {ref for number in numbers for ref in resolver.selecting(number)}
    before = [(state.policies[ref].policy, state.policies[ref].rule_base) for ref in sorted(refs)]
    replaced = deleted | {policy.ref for policy in candidates}
    after = [(policy, base) for policy, base in before if policy.ref not in replaced]
    base = max((base + rule_count(policy) for policy, base in before), default=16)
    for policy in candidates:
        after.append((policy, RuleId(base)))
        base += rule_count(policy)
    labels = {n: resolver.labels(n) or Labels.EMPTY for n in numbers if n not in reserved_labels()}
    addresses = {number: resolver.addresses_of(number) for number in numbers}
    return Plan(resolver.settings, connections, ends, labels, addresses, before, after)


def _difference(plan: Plan) -> Difference:
    old, new = (Questions(_planned(plan, policies)) for policies in (plan.before, plan.after))
    return difference(old, new, plan.connections)


def _planned(plan: Plan, policies: Iterable[tuple[Policy, RuleId]]) -> Planned:
    resolver = Resolver(plan.settings)
    resolver.set_identities(plan.labels)
    for number, addresses in plan.addresses.items():
        resolver.set_addresses(number, addresses)
    for policy, base in policies:
        resolver.set_policy(policy, base)
    return Planned(resolver, plan.ends)


# ------------------------------------------------------------------ wire


def _parse(request: pb.DiffRequest) -> list[Parsed]:
    namespace = request.default_namespace or "default"
    return [parse(one.text, one.source or "stdin", namespace) for one in request.manifests]


def _connection(message: pb.Connection) -> Connection:
    if message.proto > 255 or message.port > 65535:
        raise Invalid(f"protocol {message.proto} port {message.port} is none")
    return Connection(message.source, message.target, Ports(message.proto, message.port))


def _connections(request: pb.DiffRequest, live: Live) -> Iterator[Connection]:
    everybody = live.everybody() if request.ports else ()
    asked = len(request.connections) + len(everybody) ** 2 * len(request.ports)
    if not request.connections and not request.ports:
        raise Invalid("no connection is asked about; name some, or ports for all pairs")
    if asked > MAX_CONNECTIONS:
        raise Invalid(f"{asked} connections at once, at most {MAX_CONNECTIONS}; ask about fewer")
    yield from map(_connection, request.connections)
    for source, target, port in product(everybody, everybody, request.ports):
        if (source, target) != (WORLD, WORLD):
            asked_port = pb.Connection(
                source=source, target=target, proto=port.proto, port=port.port
            )
            yield _connection(asked_port)


def _end_to_wire(reason: Reason) -> pb.End:
    asked = reason.asked
    return pb.End(
        direction=direction_to_wire(asked.direction),
        identity=asked.subject,
        peer=asked.peer,
        verdict=word_of(reason.answer),
        reason=reason.words,
        rules=map(rule_to_wire, reason.deciders),
        policies=map(ref_to_wire, reason.policies),
        misses=[
            pb.Miss(lacks=miss.lacks, rule=rule_to_wire(miss.source))
            for miss in reason.misses
            if miss.source is not None
        ],
    )


def _difference_to_wire(
    found: Difference, problems: Sequence[pb.PolicyProblem], revision: int
) -> pb.DiffResponse:
    return pb.DiffResponse(
        denied=map(_change_to_wire, found.denied[:MAX_LISTED]),
        allowed=map(_change_to_wire, found.allowed[:MAX_LISTED]),
        changed=map(_change_to_wire, found.changed[:MAX_LISTED]),
        denied_count=len(found.denied),
        allowed_count=len(found.allowed),
        changed_count=len(found.changed),
        unchanged_count=found.unchanged,
        problems=problems,
        revision=revision,
    )


def _change_to_wire(change: Change) -> pb.ConnectionChange:
    at = change.connection
    return pb.ConnectionChange(
        connection=pb.Connection(
            source=at.source, target=at.target, proto=at.ports.proto, port=at.ports.port
        ),
        before=change.before,
        after=change.after,
        reason=change.because,
    )
