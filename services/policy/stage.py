"""A cluster on paper: endpoints and policies, to ask who may talk to whom.

    endpoints file --+
                     +--> Stage --both ends--> Verdict of a connection
    policies --------+

Every endpoint has an identity of its own here, so that its addresses are told apart.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from identity.labels import CLUSTER_KEY, K8S, NAMESPACE_KEY, NAMESPACE_LABELS_PREFIX, Label, Labels
from identity.numbers import FIRST_ALLOCATED, WORLD, NumericIdentity, reserved_labels
from services.policy.cases import PROTOCOLS, port_names
from services.policy.clauses import FIRST_CLAUSE_RULE, Direction, NamedPort, RuleId
from services.policy.compile import Answer, Compiled, compile_direction
from services.policy.conflicts import conflict
from services.policy.evaluate import word_of
from services.policy.explain import Asked, Reason, explain
from services.policy.model import Policy
from services.policy.peers import contains
from services.policy.prefixes import Network
from services.policy.resolve import Resolver, ResolverSettings, rule_count
from services.policy.tree import Malformed, documents, plain
from services.runtime.errors import Invalid, NotFound

_CLUSTER = "default"


class Endpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """named_ports: "TCP/http" -> number."""

    name: str
    namespace: str = "default"
    labels: dict[str, str] = {}
    addresses: tuple[str, ...] = ()
    named_ports: dict[str, int] = {}

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Endpoints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """namespaces: their labels; one that is not listed has its name for a label only."""

    endpoints: tuple[Endpoint, ...]
    namespaces: dict[str, dict[str, str]] = {}


def read_endpoints(text: bytes, source: str) -> Endpoints:
    """YAML or JSON. Raises Invalid."""
    try:
        (document,) = documents(text.decode())
        return msgspec.convert(plain(document.root), Endpoints)
    except Malformed as fault:
        raise Invalid(f"{source}:{fault.line}: {fault.message}") from fault
    except (ValueError, msgspec.ValidationError) as fault:
        raise Invalid(f"{source} is no list of endpoints: {fault}") from fault


@dataclass(frozen=True, slots=True, order=True)
class Ports:
    """What is asked for at the destination."""

    proto: int
    port: int

    @classmethod
    def parse(cls, text: str) -> Ports:
        """`8080`, `8080/TCP`, `53/UDP`, `8/ICMP`."""
        number, _, word = text.partition("/")
        known = {name.lower(): proto for name, proto in PROTOCOLS.items()}
        proto = known.get(word.lower() or "tcp")
        if proto is None or not number.isdigit() or int(number) > 65535:
            raise Invalid(f"port {text!r} is not written like 8080/TCP, 53/UDP or 8/ICMP")
        return cls(proto, int(number))

    def __str__(self) -> str:
        names = {proto: name for name, proto in PROTOCOLS.items()}
        return f"{self.port}/{names[self.proto]}"


class Stage:
    """Raises Invalid where two endpoints share a name."""

    def __init__(self, given: Endpoints, policies: Iterable[Policy]) -> None:
        self._given = given
        self._resolver = Resolver(ResolverSettings(cluster=_CLUSTER))
        self._numbers: dict[str, NumericIdentity] = {}
        self._endpoints: dict[NumericIdentity, Endpoint] = {}
        self._names: dict[NumericIdentity, Mapping[NamedPort, int]] = {}
        self._conflicts: dict[NumericIdentity, str] = {}
        self._compiled: dict[tuple[NumericIdentity, Direction], Compiled | None] = {}
        self._answers: dict[tuple[NumericIdentity, Direction], dict[int, Answer]] = {}
        for endpoint in given.endpoints:
            self._enter(endpoint)
        base = int(FIRST_CLAUSE_RULE)
        self._policies = tuple(policies)
        for policy in self._policies:
            self._resolver.set_policy(policy, RuleId(base))
            base += rule_count(policy)
        self._egress_names = _united(self._names.values())

    def _enter(self, endpoint: Endpoint) -> None:
        name = str(endpoint)
        if name in self._numbers:
            raise Invalid(f"endpoint {name} is listed twice; remove one of them")
        number = NumericIdentity(FIRST_ALLOCATED + len(self._numbers))
        self._numbers[name] = number
        self._endpoints[number] = endpoint
        try:
            self._names[number] = port_names(endpoint.named_ports)
            self._resolver.set_identities({number: self._labels(endpoint)})
            self._resolver.set_addresses(number, endpoint.addresses)
        except ValueError as fault:
            raise Invalid(f"endpoint {name}: {fault}") from fault

    def _labels(self, endpoint: Endpoint) -> Labels:
        namespace = endpoint.namespace
        known = {"kubernetes.io/metadata.name": namespace} | self._given.namespaces.get(
            namespace, {}
        )
        found = [Label(K8S, key, value) for key, value in endpoint.labels.items()]
        found += [Label(K8S, NAMESPACE_LABELS_PREFIX + key, value) for key, value in known.items()]
        found += [Label(K8S, NAMESPACE_KEY, namespace), Label(K8S, CLUSTER_KEY, _CLUSTER)]
        return Labels(found)

    # -------------------------------------------------------------- asking

    @property
    def endpoints(self) -> Sequence[str]:
        return tuple(self._numbers)

    def identity(self, text: str) -> NumericIdentity:
        """`namespace/name`, a reserved name such as world or host, or an address."""
        if text in self._numbers:
            return self._numbers[text]
        for number, labels in reserved_labels().items():
            if text in {label.key for label in labels if len(labels) == 1}:
                return number
        try:
            return self._at(ipaddress.ip_network(text))
        except ValueError as fault:
            raise NotFound(
                f"{text!r} is no endpoint (namespace/name), no reserved name and no address"
            ) from fault

    def _at(self, network: Network) -> NumericIdentity:
        for number, endpoint in self._endpoints.items():
            if any(ipaddress.ip_network(one) == network for one in endpoint.addresses):
                return number
        best = (-1, WORLD)
        for text, number in self._resolver.prefixes().items():
            known = ipaddress.ip_network(text)
            if contains(known, network):
                best = max(best, (known.prefixlen, number))
        return best[1]

    def explain(self, source: str, target: str, ports: Ports) -> tuple[Reason, ...]:
        """Egress of the source, ingress of the target; an end that is no endpoint says nothing."""
        return tuple(
            explain(self._resolver, asked, self._names_at(asked.subject, asked.direction))
            for asked in self._ends(self.identity(source), self.identity(target), ports)
        )

    def verdict(self, source: str, target: str, ports: Ports) -> str:
        """allow, deny, redirect or auth:<mode> of the connection, both ends together."""
        ends = self._ends(self.identity(source), self.identity(target), ports)
        words = [self._word(asked) for asked in ends]
        for word in ("deny", *sorted(w for w in words if w.startswith("auth:")), "redirect"):
            if word in words:
                return word
        return "allow"

    def findings(self) -> Iterator[str]:
        """What is legal but surely a mistake: policies for nobody, and conflicts of endpoints."""
        for policy in self._policies:
            if not self._resolver.selected_by(policy.ref) and not policy.rules[0].on_nodes:
                yield f"{policy.ref} selects no endpoint"
        for name, number in self._numbers.items():
            fault = conflict(self._resolver.local_policy(number))
            if fault:
                yield f"endpoint {name}: {fault}"

    def _ends(
        self, source: NumericIdentity, target: NumericIdentity, ports: Ports
    ) -> Iterator[Asked]:
        if source in self._endpoints:
            yield Asked(Direction.EGRESS, source, target, ports.proto, ports.port)
        if target in self._endpoints:
            yield Asked(Direction.INGRESS, target, source, ports.proto, ports.port)

    def _names_at(self, subject: NumericIdentity, direction: Direction) -> Mapping[NamedPort, int]:
        return self._names[subject] if direction is Direction.INGRESS else self._egress_names

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
        return word_of(answer.lookup(asked.proto, asked.port))

    def _compile(self, subject: NumericIdentity, direction: Direction) -> None:
        local = self._resolver.local_policy(subject)
        self._conflicts[subject] = conflict(local)
        compiled = compile_direction(local, direction, self._names_at(subject, direction))
        self._compiled[subject, direction] = compiled
        parts = (
            {}
            if compiled is None
            else compiled.partition(lambda group: self._resolver.group(group).members)
        )
        self._answers[subject, direction] = {
            peer: answer for answer, held in parts.items() for peer in held
        }


def _united(held: Iterable[Mapping[NamedPort, int]]) -> dict[NamedPort, int]:
    """A name that stands for two numbers is unresolved."""
    numbers: dict[NamedPort, set[int]] = {}
    for names in held:
        for name, number in names.items():
            numbers.setdefault(name, set()).add(number)
    return {name: found.pop() for name, found in numbers.items() if len(found) == 1}
