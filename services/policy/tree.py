"""YAML and JSON text to a tree of positioned nodes, with bounds on everything a text can inflate.

    text --events--> tree of Scalar | Sequence | Mapping, one per document

The events are libyaml's. Own tree instead of a loader's objects: every node knows its line and
column, duplicate keys and aliases are seen, and depth and alias expansion are bounded meanwhile.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from yaml import CLoader, parse
from yaml.error import Mark, MarkedYAMLError, YAMLError
from yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

MAX_BYTES = 1 << 20
MAX_DEPTH = 64  # a policy is some ten levels deep
MAX_ALIASED_NODES = 10_000  # nodes that aliases add to a document

_INT = re.compile(r"[-+]?[0-9]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")


@dataclass(frozen=True, slots=True)
class Place:
    """One-based line and column; `offset` counts characters from the start of the text."""

    line: int
    column: int
    offset: int


@dataclass(frozen=True, slots=True)
class Scalar:
    place: Place
    end: int
    value: str | int | float | bool | None
    text: str


@dataclass(frozen=True, slots=True)
class Sequence:
    place: Place
    end: int
    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Mapping:
    """`duplicates`: keys given again; the first one stands."""

    place: Place
    end: int
    entries: dict[str, Entry]
    duplicates: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    place: Place
    value: Node


Node = Scalar | Sequence | Mapping

_NOWHERE: Final = Place(1, 1, 0)


@dataclass(frozen=True, slots=True)
class Document:
    """`start` and `end` bound its text, comments before and after it included."""

    root: Node
    start: int
    end: int


class Malformed(Exception):
    """The text is not YAML, or exceeds a bound. Stays inside services/policy."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.column = column


Plain = str | int | float | bool | list["Plain"] | dict[str, "Plain"] | None


def plain(node: Node) -> Plain:
    if isinstance(node, Scalar):
        return node.value
    if isinstance(node, Mapping):
        return {key: plain(entry.value) for key, entry in node.entries.items()}
    return [plain(item) for item in node.items]


def from_plain(value: object, depth: int = 0) -> Node:
    """A tree without places, of what JSON can hold. Raises Malformed where it is too deep."""
    if depth >= MAX_DEPTH:
        raise _too("nested more than", MAX_DEPTH, "levels deep", _NOWHERE)
    if isinstance(value, dict):
        entries = {
            key: Entry(key, _NOWHERE, from_plain(item, depth + 1)) for key, item in value.items()
        }
        return Mapping(_NOWHERE, 0, entries, ())
    if isinstance(value, list):
        return Sequence(_NOWHERE, 0, tuple(from_plain(item, depth + 1) for item in value))
    if value is None or isinstance(value, str | int | float):
        return Scalar(_NOWHERE, 0, value, "null" if value is None else str(value))
    raise Malformed(f"{type(value).__name__} is nothing that JSON can hold", 1, 1)


def documents(text: str) -> Iterator[Document]:
    """Documents in order, empty ones left out. Raises Malformed at the first unreadable place."""
    readable = text.replace("\t", " ") if _is_json(text) else text
    try:
        yield from _Composer(text).compose(parse(readable, Loader=CLoader))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = _within(text, mark.line, mark.column) if mark else (1, 1)
        raise Malformed(f"not valid YAML: {_words(error)}", *where) from error
    except YAMLError as error:
        raise Malformed(f"not valid YAML: {' '.join(str(error).split())}", 1, 1) from error
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not valid YAML: {error}", 1, 1) from error


def _is_json(text: str) -> bool:
    """JSON may be indented with tabs, which YAML forbids; inside JSON strings tabs are escaped."""
    if "\t" not in text or text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _within(text: str, line: int, column: int) -> tuple[int, int]:
    """One-based; a place behind the last line, as libyaml has it, becomes the end of that line."""
    last = text.count("\n")
    if line <= last:
        return line + 1, column + 1
    return last + 1, len(text) - text.rfind("\n")


def _words(error: MarkedYAMLError) -> str:
    said = [part.strip() for part in (error.context, error.problem) if part]
    return ", ".join(said) or "unreadable"


@dataclass(slots=True)
class _Open:
    """A collection still being read. In a mapping `key` waits for its value."""

    place: Place
    anchor: str | None
    mapping: bool
    items: list[Node] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    duplicates: list[Entry] = field(default_factory=list)
    key: Scalar | None = None


class _Composer:
    """Builds one document at a time from events, without recursion."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Node, int]] = {}
        self._root: Node | None = None
        self._aliased = 0

    def compose(self, events: Iterator[Event]) -> Iterator[Document]:
        start = 0
        begun: Document | None = None
        for event in events:
            match event:
                case DocumentStartEvent():
                    if begun is not None:
                        yield Document(begun.root, begun.start, _line_start(event.start_mark))
                    begun = None
                    if event.explicit:
                        start = event.end_mark.index
                    self._anchors, self._root, self._aliased = {}, None, 0
                case DocumentEndEvent():
                    if self._root is not None and not _is_blank(self._root):
                        begun = Document(self._root, start, len(self._text))
                    start = event.end_mark.index
                case _:
                    self._node(event)
        if begun is not None:
            yield begun

    def _node(self, event: Event) -> None:
        match event:
            case ScalarEvent():
                self._add(self._scalar(event), event.anchor)
            case AliasEvent():
                self._add(self._alias(event))
            case SequenceStartEvent() | MappingStartEvent():
                place = _place(event.start_mark)
                if len(self._open) >= MAX_DEPTH:
                    raise _too("nested more than", MAX_DEPTH, "levels deep", place)
                mapping = isinstance(event, MappingStartEvent)
                self._open.append(_Open(place, event.anchor, mapping))
            case SequenceEndEvent() | MappingEndEvent():
                done = self._open.pop()
                end = event.end_mark.index
                node: Node
                if done.mapping:
                    node = Mapping(done.place, end, done.entries, tuple(done.duplicates))
                else:
                    node = Sequence(done.place, end, tuple(done.items))
                self._add(node, done.anchor)

    def _scalar(self, event: ScalarEvent) -> Scalar:
        place = _place(event.start_mark)
        plain = event.style is None or event.style == ""
        value = _resolve(event.value) if plain and event.tag is None else event.value
        return Scalar(place, event.end_mark.index, value, event.value)

    def _alias(self, event: AliasEvent) -> Node:
        place = _place(event.start_mark)
        found = self._anchors.get(event.anchor)
        if found is None:
            raise Malformed(f"alias *{event.anchor} names no anchor above it", *_at(place))
        self._aliased += found[1]
        if self._aliased > MAX_ALIASED_NODES:
            raise _too("aliases add more than", MAX_ALIASED_NODES, "nodes", place)
        return found[0]

    def _add(self, node: Node, anchor: str | None = None) -> None:
        if anchor is not None:
            self._anchors[anchor] = (node, _size(node))
        if not self._open:
            self._root = node
            return
        parent = self._open[-1]
        if not parent.mapping:
            parent.items.append(node)
        elif parent.key is None:
            if not isinstance(node, Scalar):
                raise Malformed("a mapping key must be a plain word", *_at(node.place))
            parent.key = node
        else:
            entry = Entry(parent.key.text, parent.key.place, node)
            if entry.key in parent.entries:
                parent.duplicates.append(entry)
            else:
                parent.entries[entry.key] = entry
            parent.key = None


def _size(node: Node) -> int:
    """Nodes in the expansion. An alias inside was counted by its own expansion already."""
    total, stack = 0, [node]
    while stack and total <= MAX_ALIASED_NODES:
        at = stack.pop()
        total += 1
        if isinstance(at, Sequence):
            stack.extend(at.items)
        elif isinstance(at, Mapping):
            stack.extend(entry.value for entry in at.entries.values())
    return total


def _resolve(text: str) -> str | int | float | bool | None:
    """Plain scalars as the YAML 1.2 core schema reads them; yes, no, on and off are words."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if _INT.match(text) and len(text) <= 20:
        return int(text)
    return float(text) if _FLOAT.match(text) and len(text) <= 40 else text


def _is_blank(node: Node) -> bool:
    return isinstance(node, Scalar) and node.value is None


def _too(what: str, limit: int, unit: str, place: Place) -> Malformed:
    return Malformed(f"{what} {limit} {unit}: split or flatten the document", *_at(place))


def _place(mark: Mark) -> Place:
    return Place(mark.line + 1, mark.column + 1, mark.index)


def _line_start(mark: Mark) -> int:
    return int(mark.index - mark.column)


def _at(place: Place) -> tuple[int, int]:
    return place.line, place.column
