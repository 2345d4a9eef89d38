"""A cluster on paper: endpoints and policies, to ask who may talk to whom.

    endpoints file --+
                     +--> Stage --questions.py--> verdict of a connection, and why
    policies --------+

Every endpoint has an identity of its own here, so that its addresses are told apart.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from identity.labels import CLUSTER_KEY, K8S, NAMESPACE_KEY, NAMESPACE_LABELS_PREFIX, Label, Labels
from identity.numbers import FIRST_ALLOCATED, NumericIdentity
from services.policy.advice import idle
from services.policy.cases import port_names
from services.policy.cidr_groups import CidrGroup
from services.policy.clauses import FIRST_CLAUSE_RULE, Direction, NamedPort, RuleId
from services.policy.model import Policy
from services.policy.prefixes import Network
from services.policy.questions import Questions, outside, reserved_named
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


class Stage:
    """Raises Invalid where two endpoints share a name."""

    host_let_in = False  # its resolver says so itself

    def __init__(
        self, given: Endpoints, policies: Iterable[Policy], groups: Iterable[CidrGroup] = ()
    ) -> None:
        self._given = given
        self.resolver = Resolver(ResolverSettings(cluster=_CLUSTER))
        self.questions = Questions(self)
        self._numbers: dict[str, NumericIdentity] = {}
        self._endpoints: dict[NumericIdentity, Endpoint] = {}
        self._names: dict[NumericIdentity, Mapping[NamedPort, int]] = {}
        for endpoint in given.endpoints:
            self._enter(endpoint)
        self._groups = {group.name: group for group in groups}
        self.resolver.set_cidr_groups(self._groups.values())
        base = int(FIRST_CLAUSE_RULE)
        self._policies = tuple(policies)
        for policy in self._policies:
            self.resolver.set_policy(policy, RuleId(base))
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
            self.resolver.set_identities({number: self._labels(endpoint)})
            self.resolver.set_addresses(number, endpoint.addresses)
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
        known = self._numbers.get(text) or reserved_named(text)
        if known is not None:
            return known
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
        return outside(self.resolver, network)

    def is_endpoint(self, number: NumericIdentity) -> bool:
        return number in self._endpoints

    def port_names(self, number: NumericIdentity, direction: Direction) -> Mapping[NamedPort, int]:
        return self._names[number] if direction is Direction.INGRESS else self._egress_names

    def findings(self) -> Iterator[str]:
        """What is legal but surely a mistake: selectors of nobody, and conflicts of endpoints."""
        for policy in self._policies:
            yield from map(str, idle(policy, self.resolver, self._groups))
        for name, number in self._numbers.items():
            fault = self.questions.conflict(number)
            if fault:
                yield f"endpoint {name}: {fault}"


def _united(held: Iterable[Mapping[NamedPort, int]]) -> dict[NamedPort, int]:
    """A name that stands for two numbers is unresolved."""
    numbers: dict[NamedPort, set[int]] = {}
    for names in held:
        for name, number in names.items():
            numbers.setdefault(name, set()).add(number)
    return {name: found.pop() for name, found in numbers.items() if len(found) == 1}
