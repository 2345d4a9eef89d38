"""Label selectors: a conjunction of requirements, with one canonical text each.

    app=web,tier in (api,db),!canary,k8s:env!=dev,reserved:host

A key without a source, or with source "any", is met by a label of any source. `Selector(())`
chooses everything (text "*"), `Selector.NOTHING` nothing (text "!*").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Final, assert_never

from identity.labels import ANY, Invalid, Label, Labels


class Operator(StrEnum):
    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


# Operators that a label set without the key cannot meet.
POSITIVE: Final = frozenset({Operator.IN, Operator.EXISTS})


@dataclass(frozen=True, slots=True)
class Requirement:
    """`values` are held sorted and unique. IN without values is met by nothing."""

    source: str
    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(sorted(set(self.values))))
        if self.values and self.operator in (Operator.EXISTS, Operator.DOES_NOT_EXIST):
            raise Invalid(f"{self.operator} {self.name}: takes no values; use In or NotIn")

    @classmethod
    def of(cls, key: str, operator: Operator, values: Iterable[str] = ()) -> Requirement:
        """`key` may carry its source, as in "k8s:app" or "$host"."""
        label = Label.parse(key)
        if label.value or "=" in key:
            raise Invalid(f"selector key {key!r} holds a value; give the key alone")
        bare = key == label.key
        return cls(ANY if bare else label.source, label.key, operator, tuple(values))

    @property
    def name(self) -> str:
        return self.key if self.source == ANY else f"{self.source}:{self.key}"

    def matches(self, labels: Labels) -> bool:
        label = labels.get(self.key, self.source)
        match self.operator:
            case Operator.IN:
                return label is not None and label.value in self.values
            case Operator.NOT_IN:
                return label is None or label.value not in self.values
            case Operator.EXISTS:
                return label is not None
            case Operator.DOES_NOT_EXIST:
                return label is None
            case _:
                assert_never(self.operator)

    def __str__(self) -> str:
        match self.operator:
            case Operator.IN if len(self.values) == 1:
                return f"{self.name}={self.values[0]}"
            case Operator.NOT_IN if len(self.values) == 1:
                return f"{self.name}!={self.values[0]}"
            case Operator.IN:
                return f"{self.name} in ({','.join(self.values)})"
            case Operator.NOT_IN:
                return f"{self.name} notin ({','.join(self.values)})"
            case Operator.EXISTS:
                return self.name
            case Operator.DOES_NOT_EXIST:
                return f"!{self.name}"
            case _:
                assert_never(self.operator)


@dataclass(frozen=True, slots=True)
class Selector:
    """Requirements, all of which must be met; held sorted and unique, so equal means equal."""

    requirements: tuple[Requirement, ...]
    _hash: int = field(init=False, repr=False, compare=False)
    # Made for sorting anyway; groups, keys and messages ask for it again and again.
    _text: str = field(init=False, repr=False, compare=False)

    EVERYTHING: ClassVar[Selector]
    NOTHING: ClassVar[Selector]

    def __post_init__(self) -> None:
        by_text = {str(requirement): requirement for requirement in self.requirements}
        texts = sorted(by_text)
        unique = tuple(by_text[text] for text in texts)
        if any(r.operator is Operator.IN and not r.values for r in unique):
            unique, texts = (_NEVER,), ["!*"]
        object.__setattr__(self, "requirements", unique)
        object.__setattr__(self, "_hash", hash(unique))
        object.__setattr__(self, "_text", ",".join(texts) or "*")

    @classmethod
    def of_labels(cls, labels: Mapping[str, str]) -> Selector:
        """Every key with its value."""
        return cls(tuple(Requirement.of(k, Operator.IN, (v,)) for k, v in labels.items()))

    @classmethod
    def parse(cls, text: str) -> Selector:
        stripped = text.strip()
        if stripped in ("", "*"):
            return cls.EVERYTHING
        if stripped == "!*":
            return cls.NOTHING
        return cls(tuple(_parse_term(term.strip(), text) for term in _terms(stripped, text)))

    def matches(self, labels: Labels) -> bool:
        return all(requirement.matches(labels) for requirement in self.requirements)

    def and_(self, *requirements: Requirement) -> Selector:
        return Selector(self.requirements + requirements)

    def mentions(self, key: str) -> bool:
        return any(requirement.key == key for requirement in self.requirements)

    def __str__(self) -> str:
        return self._text

    def __hash__(self) -> int:
        return self._hash


_NEVER: Final = Requirement(ANY, "", Operator.IN)
Selector.EVERYTHING = Selector(())
Selector.NOTHING = Selector((_NEVER,))


# ------------------------------------------------------------------ text

_SET_TERM = re.compile(r"(?P<key>[^\s=!,()]+)\s+(?P<op>in|notin)\s*\((?P<values>[^()]*)\)")
_EQUAL_TERM = re.compile(r"(?P<key>[^\s=!,()]+)\s*(?P<op>==|=|!=)\s*(?P<value>[^\s=!,()]*)")
_KEY_TERM = re.compile(r"(?P<not>!?)\s*(?P<key>[^\s=!,()]+)")
_FORMS: Final = "key, !key, key=value, key!=value, key in (a,b), key notin (a,b), joined by commas"


def _terms(stripped: str, text: str) -> list[str]:
    """Splits at the commas outside parentheses."""
    terms, depth, start = [], 0, 0
    for at, char in enumerate(stripped):
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            terms.append(stripped[start:at])
            start = at + 1
    if depth:
        raise Invalid(f"selector {text!r}: parentheses do not pair; the forms are {_FORMS}")
    return [*terms, stripped[start:]]


def _parse_term(term: str, text: str) -> Requirement:
    if found := _SET_TERM.fullmatch(term):
        values = tuple(value.strip() for value in found["values"].split(","))
        operator = Operator.IN if found["op"] == "in" else Operator.NOT_IN
        return Requirement.of(found["key"], operator, values)
    if found := _EQUAL_TERM.fullmatch(term):
        operator = Operator.NOT_IN if found["op"] == "!=" else Operator.IN
        return Requirement.of(found["key"], operator, (found["value"],))
    if found := _KEY_TERM.fullmatch(term):
        operator = Operator.DOES_NOT_EXIST if found["not"] else Operator.EXISTS
        return Requirement.of(found["key"], operator)
    raise Invalid(f"selector {text!r}: cannot read {term!r}; the forms are {_FORMS}")


# ------------------------------------------------------------------ Kubernetes label syntax

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_MAX_NAME = 63
_MAX_PREFIX = 253


def key_problem(key: str) -> str | None:
    """What keeps `key` (without a source) from being a Kubernetes label key."""
    prefix, slash, name = key.rpartition("/")
    if slash and not (len(prefix) <= _MAX_PREFIX and _SUBDOMAIN.fullmatch(prefix)):
        return (
            f"prefix {prefix!r} of label key {key!r} is not a lower-case DNS name"
            f" of at most {_MAX_PREFIX} characters"
        )
    if not (len(name) <= _MAX_NAME and _NAME.fullmatch(name)):
        return (
            f"label key {key!r}: the name is 1 to {_MAX_NAME} letters, digits, '-', '_', '.',"
            " with a letter or digit at both ends"
        )
    return None


def value_problem(value: str) -> str | None:
    """What keeps `value` from being a Kubernetes label value."""
    if value and not (len(value) <= _MAX_NAME and _NAME.fullmatch(value)):
        return (
            f"label value {value!r} is not empty nor up to {_MAX_NAME} letters, digits, '-', '_',"
            " '.', with a letter or digit at both ends"
        )
    return None
