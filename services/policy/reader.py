"""Reading a positioned tree with findings instead of exceptions.

A `Cursor` is a node and the field path that leads to it. Each accessor returns the value, or None
after noting on the `Report` what is wrong, where, and what would fix it. An explicit null reads as
an absent field, as it does for the Kubernetes API.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from services.policy.clauses import PolicyRef
from services.policy.features import Dialect, Features
from services.policy.tree import Entry, Mapping, Node, Place, Plain, Scalar, Sequence, plain

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding. An error refuses its document; a warning does not. Line and column from 1."""

    severity: Severity
    ref: PolicyRef | None
    path: str
    line: int
    column: int
    message: str
    source: str


# Of one document. A reader needs the first few; a flood of them only costs time.
MAX_PROBLEMS = 100
MAX_QUOTED = 80


class TooMany(Exception):
    """Reading a document has found enough. Stays inside services/policy."""


@dataclass(slots=True)
class Report:
    """The findings about one document. Raises TooMany when they reach MAX_PROBLEMS."""

    source: str
    features: Features = Features.NODE
    dialect: Dialect = Dialect.TESSERA
    ref: PolicyRef | None = None
    problems: list[Problem] = field(default_factory=list)
    failed: bool = False
    _forgiving: bool = field(default=False, init=False)

    def error(self, path: str, place: Place, message: str) -> None:
        if self._forgiving:
            self._add("warning", path, place, message)
            return
        self.failed = True
        self._add("error", path, place, message)

    @contextmanager
    def forgiving(self) -> Iterator[None]:
        """What would be an error is a warning in here: a dialect does not look at it."""
        self._forgiving = True
        try:
            yield
        finally:
            self._forgiving = False

    def advise(self, path: str, place: Place, message: str) -> None:
        self._add("warning", path, place, message)

    def _add(self, severity: Severity, path: str, place: Place, message: str) -> None:
        found = Problem(severity, self.ref, path, place.line, place.column, message, self.source)
        if found not in self.problems:  # a field may be looked at more than once
            self.problems.append(found)
            if len(self.problems) >= MAX_PROBLEMS:
                raise TooMany


@dataclass(frozen=True, slots=True)
class Cursor:
    """`place` is where the field begins: its key in a mapping, the value itself in a list."""

    report: Report
    path: str
    node: Node
    place: Place

    def error(self, message: str) -> None:
        self.report.error(self.path, self.place, message)

    def advise(self, message: str) -> None:
        self.report.advise(self.path, self.place, message)

    def needs(self, feature: Features, message: str) -> bool:
        """Whether the feature is let in; the message is an error where it is not."""
        if feature in self.report.features:
            return True
        self.error(message)
        return False

    def fields(self, *known: str) -> Fields | None:
        """A mapping with these keys only; a key not among them is an error that names the nearest.

        Without `known`: any keys.
        """
        if not isinstance(self.node, Mapping):
            self.error(f"must be a mapping, not {_kind(self.node)}")
            return None
        for entry in self.node.duplicates:
            self.report.error(
                _join(self.path, entry.key),
                entry.place,
                f"key {entry.key!r} is given twice; remove one of them",
            )
        if known:
            self._refuse_unknown(self.node, known)
        return Fields(self, self.node.entries)

    def _refuse_unknown(self, node: Mapping, known: tuple[str, ...]) -> None:
        for entry in node.entries.values():
            if entry.key not in known:
                message = f"unknown field {clipped(entry.key)!r}; {_nearest(entry.key, known)}"
                strict = self.report.dialect is Dialect.TESSERA
                note = self.report.error if strict else self.report.advise
                note(_join(self.path, entry.key), entry.place, message)

    def items(self) -> list[Cursor] | None:
        """The elements of a list, nulls among them refused."""
        if not isinstance(self.node, Sequence):
            self.error(f"must be a list, not {_kind(self.node)}; put a '-' before each element")
            return None
        found = []
        for n, node in enumerate(self.node.items):
            cursor = Cursor(self.report, f"{self.path}[{n}]", node, node.place)
            if isinstance(node, Scalar) and node.value is None:
                cursor.error("is empty; remove it or write a value")
            else:
                found.append(cursor)
        return found

    def text(self) -> str | None:
        if isinstance(self.node, Scalar) and isinstance(self.node.value, str):
            return self.node.value
        if isinstance(self.node, Scalar) and self.node.value is not None:
            written = self.node.text
            self.error(f'must be a string, not {_kind(self.node)}; quote it: "{written}"')
        else:
            self.error(f"must be a string, not {_kind(self.node)}")
        return None

    def integer(self) -> int | None:
        value = self.node.value if isinstance(self.node, Scalar) else None
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        self.error(f"must be a number, not {_kind(self.node)}")
        return None

    def boolean(self) -> bool | None:
        if isinstance(self.node, Scalar) and isinstance(self.node.value, bool):
            return self.node.value
        self.error(f"must be true or false, not {_kind(self.node)}")
        return None

    def plain(self) -> Plain:
        """The value as JSON would hold it."""
        return plain(self.node)

    def port_word(self) -> str | None:
        """A string or a number, as text."""
        node = self.node
        if isinstance(node, Scalar) and isinstance(node.value, str | int):
            return str(node.value) if not isinstance(node.value, bool) else self.text()
        return self.text()


@dataclass(frozen=True, slots=True)
class Fields:
    """The keys of one mapping."""

    at: Cursor
    entries: dict[str, Entry]

    def get(self, key: str) -> Cursor | None:
        """None when absent or null."""
        entry = self.entries.get(key)
        if entry is None or (isinstance(entry.value, Scalar) and entry.value.value is None):
            return None
        return self._cursor(entry)

    def require(self, key: str, why: str) -> Cursor | None:
        found = self.get(key)
        if found is None:
            self.at.error(f"{key} is missing; {why}")
        return found

    def items(self, key: str) -> list[Cursor] | None:
        """The elements of a list field; None when absent, null or no list."""
        found = self.get(key)
        return None if found is None else found.items()

    def text(self, key: str) -> str | None:
        found = self.get(key)
        return None if found is None else found.text()

    def __iter__(self) -> Iterator[tuple[str, Cursor]]:
        """Every key, those with a null value included."""
        return ((key, self._cursor(entry)) for key, entry in self.entries.items())

    def _cursor(self, entry: Entry) -> Cursor:
        path = _join(self.at.path, entry.key)
        return Cursor(self.at.report, path, entry.value, entry.place)


def is_empty(node: Node) -> bool:
    """Says nothing: null, an empty list or mapping, or a mapping of such."""
    match node:
        case Scalar():
            return node.value is None
        case Sequence():
            return not node.items
        case Mapping():
            return all(is_empty(entry.value) for entry in node.entries.values())


def one_of(known: tuple[str, ...], word: str) -> str:
    """Words for a value that is none of `known`."""
    return f"{clipped(word)!r} is not known; {_nearest(word, known)}"


def clipped(word: str) -> str:
    """Short enough to stand in a message."""
    return word if len(word) <= MAX_QUOTED else f"{word[:MAX_QUOTED]}..."


def _nearest(word: str, known: tuple[str, ...]) -> str:
    word = word[:MAX_QUOTED]
    folded = {name.lower(): name for name in known}
    if close := get_close_matches(word.lower(), folded, 1, 0.6):
        return f"did you mean {folded[close[0]]!r}?"
    return f"known here: {', '.join(known)}"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _kind(node: Node) -> str:
    match node:
        case Mapping():
            return "a mapping"
        case Sequence():
            return "a list"
        case Scalar(value=None):
            return "empty"
        case Scalar(value=bool()):
            return "true or false"
        case Scalar(value=str()):
            return "a string"
        case Scalar():
            return "a number"
