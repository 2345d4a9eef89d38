"""Class numbers: one per distinct set of port rows, the same for every slot of the node.

Content-addressed: two answers with equal port rows share a class, whichever endpoint gives them
(what they answer for "all ports" stands in the peer row). A number is never given twice in the
life of the tables, so a packet that read a peer row just before its class was swept cannot find
another class's ports under the number; it finds nothing, and drops.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from datapath.maps.layout import (
    RANGE_FIXED_BITS,
    PeerFlags,
    PolicyAnswer,
    PolicyPeer,
    PolicyPortKey,
    PolicyRangeKey,
    Verdict,
)
from services.policy.compile import Answer, ExactPort, PortAnswer, PortBlock

NO_CLASS = 0
Content = tuple[tuple[ExactPort, ...], tuple[PortBlock, ...]]
PortRows = dict[PolicyPortKey, PolicyAnswer]
RangeRows = dict[PolicyRangeKey, PolicyAnswer]
# The rows without the class number.
Fingerprint = tuple[
    frozenset[tuple[int, int, PolicyAnswer]], frozenset[tuple[int, int, int, PolicyAnswer]]
]


@dataclass(frozen=True, slots=True)
class Swept:
    """Rows to take out of the tables. `slots`: all that ever pointed to them, lest a packet that
    read a peer row before, and finds no port row now, is believed."""

    rows: ClassRows
    slots: frozenset[int]


@dataclass(frozen=True, slots=True)
class ClassRows:
    ports: PortRows
    ranges: RangeRows

    def fingerprint(self) -> Fingerprint:
        return (
            frozenset((k.proto, k.dport, v) for k, v in self.ports.items()),
            frozenset((k.prefixlen, k.proto, k.dport, v) for k, v in self.ranges.items()),
        )


class Classes:
    """Numbers, reference counts, and which classes have rows in the tables."""

    def __init__(self) -> None:
        self._rows: dict[int, ClassRows] = {}
        self._by_fingerprint: dict[Fingerprint, int] = {}
        self._by_content: dict[Content, int] = {}
        self._references: Counter[int] = Counter()
        self._written: set[int] = set()
        self._pointed: defaultdict[int, set[int]] = defaultdict(set)
        self._next = 1

    def number(self, answer: Answer) -> int:
        """Of the class that holds the answer's port rows; 0 for an answer without any."""
        if not answer.ports and not answer.ranges:
            return NO_CLASS
        content = (answer.ports, answer.ranges)
        number = self._by_content.get(content)
        if number is None:
            number = self._by_content[content] = self._numbered(content)
        return number

    def _numbered(self, content: Content) -> int:
        rows = _rows(self._next, content)
        fingerprint = rows.fingerprint()
        number = self._by_fingerprint.get(fingerprint)
        if number is not None:
            return number
        number, self._next = self._next, self._next + 1
        self._rows[number] = rows
        self._by_fingerprint[fingerprint] = number
        return number

    def peer_row(self, answer: Answer) -> PolicyPeer:
        flags = PeerFlags(0)
        if answer.ports:
            flags |= PeerFlags.HAS_PORTS
        if answer.ranges:
            flags |= PeerFlags.HAS_RANGES
        decided = answer.all
        return PolicyPeer(
            self.number(answer), decided.rule_id, 0, Verdict(int(decided.verdict)), flags
        )

    def rows(self, number: int) -> ClassRows:
        return self._rows[number]

    def unwritten(self, numbers: Iterable[int]) -> set[int]:
        return {n for n in numbers if n != NO_CLASS and n not in self._written}

    def mark_written(self, numbers: Iterable[int]) -> None:
        self._written.update(numbers)

    def move_references(self, slot: int, *, to: Iterable[int], of: Iterable[int]) -> None:
        """`slot` now uses the classes `to`; in place of `of`, its own before or another slot's."""
        found = list(to)
        self._references.update(found)
        self._references.subtract(of)
        for number in found:
            self._pointed[number].add(slot)

    def take_unused(self) -> list[Swept]:
        """Forgets every class no slot refers to; answers those that stand in the tables."""
        unused = {n for n in self._rows if self._references[n] <= 0}
        if not unused:
            return []
        swept = [
            Swept(self._rows[n], frozenset(self._pointed[n]))
            for n in sorted(unused & self._written)
        ]
        self._written -= unused
        for number in unused:
            del self._rows[number], self._references[number]
            self._pointed.pop(number, None)
        self._by_content = {c: n for c, n in self._by_content.items() if n not in unused}
        self._by_fingerprint = {f: n for f, n in self._by_fingerprint.items() if n not in unused}
        return swept

    def adopt(
        self,
        ports: Mapping[PolicyPortKey, PolicyAnswer],
        ranges: Mapping[PolicyRangeKey, PolicyAnswer],
    ) -> None:
        """Take over the numbers the tables hold (start-up, before any other call)."""
        found: dict[int, ClassRows] = {}
        for port_key, value in ports.items():
            found.setdefault(port_key.class_id, ClassRows({}, {})).ports[port_key] = value
        for range_key, value in ranges.items():
            found.setdefault(range_key.class_id, ClassRows({}, {})).ranges[range_key] = value
        for number, rows in sorted(found.items()):
            self._rows[number] = rows
            self._by_fingerprint.setdefault(rows.fingerprint(), number)
            self._written.add(number)
            self._next = max(self._next, number + 1)


def _rows(number: int, content: Content) -> ClassRows:
    ports, ranges = content
    return ClassRows(
        {PolicyPortKey(number, p.port, p.proto): _packed(p.answer) for p in ports},
        {
            PolicyRangeKey(RANGE_FIXED_BITS + b.bits, number, b.proto, b.port): _packed(b.answer)
            for b in ranges
        },
    )


def _packed(answer: PortAnswer) -> PolicyAnswer:
    return PolicyAnswer(answer.rule_id, 0, Verdict(int(answer.verdict)))
