"""Label selectors of manifests, and the namespaces they are confined to.

CiliumNetworkPolicy             subject: own namespace, always; peer: own namespace, unless it
                                speaks of namespaces or of reserved labels
CiliumClusterwideNetworkPolicy  subject: as written; peer: anything with a namespace, unless ...
NetworkPolicy                   pod and namespace selectors, both about k8s labels only
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from identity.labels import (
    ANY,
    K8S,
    NAMESPACE_KEY,
    NAMESPACE_LABELS_PREFIX,
    RESERVED,
    Invalid,
    Label,
)
from identity.selector import Operator, Requirement, Selector, key_problem, value_problem
from services.policy.reader import Cursor, Fields, one_of

OPERATORS = tuple(str(operator) for operator in Operator)


class Kind(StrEnum):
    CNP = "CiliumNetworkPolicy"
    CCNP = "CiliumClusterwideNetworkPolicy"
    NETWORK_POLICY = "NetworkPolicy"
    CLUSTER_NETWORK_POLICY = "ClusterNetworkPolicy"


CLUSTER_SCOPED = frozenset({Kind.CCNP, Kind.CLUSTER_NETWORK_POLICY})


@dataclass(frozen=True, slots=True)
class Scope:
    """namespace None: cluster-wide. `bare`: selectors are taken as written, nothing is added."""

    namespace: str | None
    bare: bool = False

    def subject(self, written: Selector, at: Cursor) -> Selector:
        if self.namespace is None or self.bare:
            return written
        kept = []
        for requirement in written.requirements:
            if not _is_equal_to_namespace(requirement):
                kept.append(requirement)
            elif requirement.values != (self.namespace,):
                at.advise(
                    f"namespace {requirement.values[0]!r} is not the policy's own,"
                    f" {self.namespace!r}, which is used; remove {requirement.name} or move the"
                    " policy"
                )
        return Selector(tuple(kept)).and_(in_namespace(self.namespace))

    def peer(self, written: Selector, subject: Selector) -> Selector:
        if self.bare or any(_confines(requirement) for requirement in written.requirements):
            return written
        if self.namespace is not None:
            return written.and_(in_namespace(self.namespace))
        if any(r.source == RESERVED and r.key == "init" for r in subject.requirements):
            return written
        return written.and_(Requirement(K8S, NAMESPACE_KEY, Operator.EXISTS))


def in_namespace(namespace: str) -> Requirement:
    return Requirement(K8S, NAMESPACE_KEY, Operator.IN, (namespace,))


def _is_equal_to_namespace(requirement: Requirement) -> bool:
    return (
        requirement.key == NAMESPACE_KEY
        and requirement.source == K8S
        and requirement.operator is Operator.IN
        and len(requirement.values) == 1
    )


def _confines(requirement: Requirement) -> bool:
    if requirement.source == RESERVED:
        return True
    spoken_of = requirement.key == NAMESPACE_KEY or requirement.key.startswith(
        NAMESPACE_LABELS_PREFIX
    )
    return spoken_of and requirement.source in (ANY, K8S)


@dataclass(frozen=True, slots=True)
class KeyStyle:
    """How a written key becomes a label key: with its own source, or prefixed and of one source."""

    source: str | None = None
    prefix: str = ""

    def split(self, written: str) -> tuple[str, str]:
        if self.source is not None:
            return self.source, self.prefix + written
        label = Label.parse(written)
        bare = written == label.key
        return (ANY if bare else label.source), label.key


WITH_SOURCE = KeyStyle()
POD_LABELS = KeyStyle(K8S)
NAMESPACE_LABELS = KeyStyle(K8S, NAMESPACE_LABELS_PREFIX)


def read_selector(at: Cursor, style: KeyStyle = WITH_SOURCE) -> Selector:
    """As written, without any scope. What cannot be read is reported and left out."""
    fields = at.fields("matchLabels", "matchExpressions")
    if fields is None:
        return Selector.EVERYTHING
    found = [*_match_labels(fields, style), *_match_expressions(fields, style)]
    return Selector(tuple(found))


def _match_labels(fields: Fields, style: KeyStyle) -> Iterator[Requirement]:
    at = fields.get("matchLabels")
    labels = at.fields() if at is not None else None
    if labels is None:
        return
    for written, cursor in labels:
        key = _key(written, cursor, style)
        value = cursor.text()
        if key is None or value is None:
            continue
        if problem := value_problem(value):
            cursor.error(f"invalid label selector: {problem}")
            continue
        yield Requirement(*key, Operator.IN, (value,))


def _match_expressions(fields: Fields, style: KeyStyle) -> Iterator[Requirement]:
    for at in fields.items("matchExpressions") or ():
        expression = at.fields("key", "operator", "values")
        if expression is None:
            continue
        key_at = expression.require("key", "name the label the expression is about")
        operator = _operator(expression)
        values = _values(expression)
        written = key_at.text() if key_at is not None else None
        if key_at is None or written is None or operator is None or values is None:
            continue
        key = _key(written, key_at, style)
        if key is not None and _values_fit(at, operator, values):
            yield Requirement(*key, operator, values)


def _key(written: str, at: Cursor, style: KeyStyle) -> tuple[str, str] | None:
    try:
        source, key = style.split(written)
    except Invalid as problem:
        at.error(f"invalid label selector: {problem}")
        return None
    bare = written if style.source is not None else key
    if problem_words := key_problem(bare):
        at.error(f"invalid label selector: {problem_words}")
        return None
    return source, key


def _operator(expression: Fields) -> Operator | None:
    at = expression.require("operator", f"one of {', '.join(OPERATORS)}")
    word = at.text() if at is not None else None
    if at is None or word is None:
        return None
    if word not in OPERATORS:
        at.error(f"invalid label selector: operator {one_of(OPERATORS, word)}")
        return None
    return Operator(word)


def _values(expression: Fields) -> tuple[str, ...] | None:
    found = []
    for at in expression.items("values") or ():
        value = at.text()
        if value is None:
            return None
        if problem := value_problem(value):
            at.error(f"invalid label selector: {problem}")
            return None
        found.append(value)
    return tuple(found)


def _values_fit(at: Cursor, operator: Operator, values: tuple[str, ...]) -> bool:
    if operator in (Operator.IN, Operator.NOT_IN) and not values:
        at.error(f"invalid label selector: {operator} needs at least one value")
        return False
    if operator in (Operator.EXISTS, Operator.DOES_NOT_EXIST) and values:
        at.error(f"invalid label selector: {operator} takes no values; use In or NotIn")
        return False
    return True
