"""Labels, label sets and the filter that decides which labels make an identity.

A label is (source, key, value), written "source:key=value". A set holds each key once, whatever
its source; sets are immutable, ordered by key and comparable. `canonical` is the form under which
a set is stored and shared with other clusters.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from typing import ClassVar, Final, NamedTuple, final

ANY: Final = "any"
K8S: Final = "k8s"
RESERVED: Final = "reserved"
CIDR: Final = "cidr"
FQDN: Final = "fqdn"
UNSPEC: Final = "unspec"

NAMESPACE_KEY: Final = "io.kubernetes.pod.namespace"
NAMESPACE_LABELS_PREFIX: Final = "io.cilium.k8s.namespace.labels."
SERVICE_ACCOUNT_KEY: Final = "io.cilium.k8s.policy.serviceaccount"
CLUSTER_KEY: Final = "io.cilium.k8s.policy.cluster"

_SOURCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f;]")
_KEY_OF = itemgetter(1)
# Parsed texts kept; a cluster repeats few labels in many sets.
_CACHED = 1 << 16


class Invalid(ValueError):
    """The text is not a label, a label set or a selector; the message is meant for its author."""


class Label(NamedTuple):
    source: str
    key: str
    value: str

    @staticmethod
    def parse(text: str) -> Label:
        """Reads "source:key=value"; no source means "unspec", "$x" stands for "reserved:x"."""
        return _parse(text)

    def __str__(self) -> str:
        if self.value:
            return f"{self.source}:{self.key}={self.value}"
        return f"{self.source}:{self.key}"


@lru_cache(maxsize=_CACHED)
def _parse(text: str) -> Label:
    head, _, value = text.partition("=")
    if head.startswith("$"):
        return _checked(text, RESERVED, head[1:], value)
    source, colon, key = head.partition(":")
    if not colon:
        return _checked(text, UNSPEC, head, value)
    return _checked(text, source, key, value)


@lru_cache(maxsize=_CACHED)
def _parse_canonical(text: str) -> Label:
    head, equals, value = text.partition("=")
    source, colon, key = head.partition(":")
    if not (equals and colon):
        raise Invalid(f"stored label {text!r} is not source:key=value; was it edited by hand?")
    return _checked(text, source, key, value)


def _checked(text: str, source: str, key: str, value: str) -> Label:
    if not _SOURCE.fullmatch(source):
        raise Invalid(
            f"label {text!r}: source {source!r} is not letters, digits, '.', '_', '-';"
            " write source:key=value, for example k8s:app=web"
        )
    if not key:
        raise Invalid(f"label {text!r}: the key is empty; write source:key=value")
    if key != key.strip() or value != value.strip():
        raise Invalid(f"label {text!r}: blanks around the key or the value; remove them")
    if _UNPRINTABLE.search(key) or _UNPRINTABLE.search(value):
        raise Invalid(f"label {text!r}: ';' and control characters cannot be stored; remove them")
    return Label(source, key, value)


@final
class Labels:
    """An immutable label set. Iterates by key."""

    __slots__ = ("_by_key", "_canonical")
    _by_key: dict[str, Label]
    _canonical: str | None

    EMPTY: ClassVar[Labels]

    def __init__(self, labels: Iterable[Label] = ()) -> None:
        """Raises `Invalid` when two different labels share a key."""
        ordered = sorted(labels, key=_KEY_OF)
        self._by_key = {label.key: label for label in ordered}
        self._canonical = None
        if len(self._by_key) != len(ordered):
            _refuse_twins(ordered)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Labels:
        return cls(map(_parse, texts))

    @classmethod
    def from_canonical(cls, text: str) -> Labels:
        return cls(_parse_canonical(part) for part in text.split(";") if part)

    def canonical(self) -> str:
        """The stored form: "source:key=value;" for each label, ordered by key."""
        if self._canonical is None:
            self._canonical = "".join(
                [f"{source}:{key}={value};" for source, key, value in self._by_key.values()]
            )
        return self._canonical

    def sources(self) -> set[str]:
        return {label.source for label in self._by_key.values()}

    def digest(self) -> str:
        """32 hex digits that stand for the set in keys of the store."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:32]

    def strings(self) -> tuple[str, ...]:
        return tuple(map(str, self._by_key.values()))

    def get(self, key: str, source: str = ANY) -> Label | None:
        label = self._by_key.get(key)
        if label is None or source in (ANY, label.source):
            return label
        return None

    def value(self, key: str, source: str = ANY) -> str | None:
        label = self.get(key, source)
        return None if label is None else label.value

    def with_label(self, label: Label) -> Labels:
        """Replaces a label of the same key."""
        return Labels((self._by_key | {label.key: label}).values())

    def keep(self, wanted: Callable[[Label], bool]) -> Labels:
        kept = list(filter(wanted, self._by_key.values()))
        return self if len(kept) == len(self._by_key) else Labels(kept)

    def __iter__(self) -> Iterator[Label]:
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, label: Label) -> bool:
        return self._by_key.get(label.key) == label

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels) and self._by_key == other._by_key

    def __hash__(self) -> int:
        return hash(tuple(self._by_key.values()))

    def __str__(self) -> str:
        return " ".join(self.strings())

    def __repr__(self) -> str:
        return f"Labels({self})"


Labels.EMPTY = Labels()


def _refuse_twins(ordered: list[Label]) -> None:
    for one, other in pairwise(ordered):
        if one.key == other.key and one != other:
            raise Invalid(
                f"label key {one.key!r} is given twice, as {str(one)!r} and {str(other)!r};"
                " a label set holds each key once"
            )


# ------------------------------------------------------------------ filter


@dataclass(frozen=True, slots=True)
class FilterRule:
    """`pattern` is a regular expression that the key must start with; `source` ANY fits all."""

    pattern: re.Pattern[str]
    source: str
    ignore: bool

    @classmethod
    def parse(cls, text: str) -> FilterRule:
        """Reads "pattern" or "source:pattern"; a "!" in front ignores what matches."""
        ignore = text.startswith("!")
        source, colon, pattern = text.removeprefix("!").partition(":")
        if not colon or not _SOURCE.fullmatch(source):
            source, pattern = ANY, text.removeprefix("!")
        if not pattern:
            raise Invalid(f"label filter {text!r} holds no pattern; write !KEY to ignore a key")
        try:
            return cls(re.compile(pattern), source, ignore)
        except re.error as error:
            raise Invalid(f"label filter {text!r} is no regular expression: {error}") from error

    def length(self, source: str, key: str) -> int:
        """How much of the key the rule covers; 0 when it does not match."""
        if self.source not in (ANY, source):
            return 0
        found = self.pattern.match(key)
        return found.end() if found else 0


DEFAULT_FILTER: Final = (
    r"reserved:.*",
    r"io\.kubernetes\.pod\.namespace",
    r"io\.cilium\.k8s\.namespace\.labels",
    r"app\.kubernetes\.io",
    r"io\.cilium\.k8s\.policy\.cluster",
    r"!io\.kubernetes",
    r"!kubernetes\.io",
    r"!.*beta\.kubernetes\.io",
    r"!k8s\.io",
    r"!statefulset\.kubernetes\.io/pod-name",
    r"!apps\.kubernetes\.io/pod-index",
    r"!batch\.kubernetes\.io/job-completion-index",
    r"!batch\.kubernetes\.io/controller-uid",
    r"!pod-template-generation",
    r"!pod-template-hash",
    r"!controller-revision-hash",
    r"!controller-uid",
    r"!annotation.*",
    r"!etcd_node",
)


@dataclass(frozen=True, slots=True)
class LabelFilter:
    """Which labels make an identity.

    The longest including match is held against the shortest ignoring one; the longer wins, the
    ignoring one on a tie. A label that no rule matches is kept, unless `allow_list`.
    """

    rules: tuple[FilterRule, ...]
    allow_list: bool = False
    # The answer depends on source and key alone; sets repeat both.
    _known: dict[tuple[str, str], bool] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def default(cls) -> LabelFilter:
        return cls(tuple(map(FilterRule.parse, DEFAULT_FILTER)))

    @classmethod
    def configured(cls, texts: Iterable[str]) -> LabelFilter:
        """The default with `texts` added; any including text turns it into an allow-list."""
        added = tuple(map(FilterRule.parse, texts))
        return cls(cls.default().rules + added, allow_list=any(not rule.ignore for rule in added))

    def apply(self, labels: Labels) -> Labels:
        return labels.keep(self.keeps)

    def keeps(self, label: Label) -> bool:
        at = (label.source, label.key)
        known = self._known.get(at)
        if known is None:
            if len(self._known) >= _CACHED:
                self._known.clear()
            known = self._known[at] = self._judge(*at)
        return known

    def _judge(self, source: str, key: str) -> bool:
        included, ignored = 0, 0
        for rule in self.rules:
            length = rule.length(source, key)
            if not length:
                continue
            if rule.ignore:
                ignored = min(ignored or length, length)
            else:
                included = max(included, length)
        return included > ignored or (not self.allow_list and not ignored)
