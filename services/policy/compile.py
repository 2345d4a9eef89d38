"""Compilation of one local policy: which answer each peer identity gets, on which ports.

    LocalPolicy --compile_direction--> Compiled --partition(group members)--> {Answer: identities}

An answer is the content of one class of the datapath. Precedence is decided here, for each class
and each distinct port block, so that the kernel never ranks rules: any deny -> DENY; else any allow
-> ALLOW; else NONE. Nothing here knows maps, slots or class numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter

from pyroaring import BitMap

from services.policy.blocks import (
    LAST_PORT,
    NO_ANSWER,
    PORT_BITS,
    PortAnswer,
    Span,
    Verdict,
    blocks,
    decide,
    steps,
)
from services.policy.clauses import (
    RULE_OPEN,
    Action,
    Clause,
    Direction,
    GroupId,
    LocalPolicy,
    PortRange,
)

__all__ = [
    "Answer",
    "Compiled",
    "ExactPort",
    "PortAnswer",
    "PortBlock",
    "Verdict",
    "compile_direction",
]


@dataclass(frozen=True, slots=True, order=True)
class ExactPort:
    """One port of one protocol. ICMP: the port is the type."""

    proto: int
    port: int
    answer: PortAnswer


@dataclass(frozen=True, slots=True, order=True)
class PortBlock:
    """The ports of `proto` that share the first `bits` bits of `port`; 0 bits: every port.

    Aligned: the low 16 - bits bits of `port` are zero. `bits` is 0..15, never 16.
    """

    proto: int
    port: int
    bits: int
    answer: PortAnswer


@dataclass(frozen=True, slots=True)
class Answer:
    """The content of a class. Lookup order: exact port, longest block, `all`.

    `ports` and `ranges` are sorted; no row's verdict is NONE. Equal answers compare and hash equal.
    """

    all: PortAnswer
    ports: tuple[ExactPort, ...]
    ranges: tuple[PortBlock, ...]

    def lookup(self, proto: int, port: int) -> PortAnswer:
        """What the datapath answers; port 0 for protocols without ports."""
        for row in self.ports:
            if row.proto == proto and row.port == port:
                return row.answer
        longest: PortBlock | None = None
        for block in self.ranges:
            shift = PORT_BITS - block.bits
            covers = block.proto == proto and block.port >> shift == port >> shift
            if covers and (longest is None or block.bits > longest.bits):
                longest = block
        return self.all if longest is None else longest.answer


@dataclass(frozen=True, slots=True)
class _Unit:
    """Clauses about the same groups; an identity matches all of them or none."""

    groups: tuple[GroupId, ...]
    clauses: tuple[Clause, ...]


@dataclass(frozen=True, slots=True)
class Compiled:
    """One direction of a local policy, ready to be applied to group members.

    `default` is the answer of the any-peer clauses alone: of an identity in none of the groups.
    """

    groups: frozenset[GroupId]
    default: Answer
    any_peer: tuple[Clause, ...]
    units: tuple[_Unit, ...]

    def partition(
        self, members: Callable[[GroupId], BitMap], within: BitMap | None = None
    ) -> dict[Answer, BitMap]:
        """Every identity of the referenced groups with its answer; values are disjoint.

        Without `within`: identities whose answer equals `default` are left out, they need no row.
        With `within`: only these identities, all of them (also those in no group), and those that
        answer `default` are listed under it, so that the caller deletes their rows.
        """
        cells, seen = self._refine(members, within)
        found: dict[Answer, BitMap] = {}
        for matching, identities in cells.items():
            clauses = (clause for n in matching for clause in self.units[n].clauses)
            answer = _answer((*self.any_peer, *clauses))
            if answer in found:
                found[answer] |= identities
            else:
                found[answer] = identities
        if within is None:
            found.pop(self.default, None)
        elif rest := within - seen:
            found[self.default] = found.get(self.default, BitMap()) | rest
        return found

    def _refine(
        self, members: Callable[[GroupId], BitMap], within: BitMap | None
    ) -> tuple[dict[tuple[int, ...], BitMap], BitMap]:
        """Cells by the units they match, and their union. Splits only what a unit overlaps."""
        cells: dict[tuple[int, ...], BitMap] = {}
        seen = BitMap()
        for number, unit in enumerate(self.units):
            chosen = _union((members(group) for group in unit.groups), within)
            if not chosen:
                continue
            overlap = chosen & seen
            fresh = chosen - seen
            seen |= fresh
            if overlap:
                _split(cells, overlap, number)
            if fresh:
                cells[(number,)] = fresh
        return cells, seen


def _split(cells: dict[tuple[int, ...], BitMap], overlap: BitMap, number: int) -> None:
    for matching, identities in list(cells.items()):
        if not identities.intersect(overlap):
            continue
        inside = identities & overlap
        outside = identities - inside
        if outside:
            cells[matching] = outside
        else:
            del cells[matching]
        cells[(*matching, number)] = inside


def _union(bitmaps: Iterable[BitMap], within: BitMap | None) -> BitMap:
    chosen = BitMap()
    for bitmap in bitmaps:
        chosen |= bitmap if within is None else bitmap & within
    return chosen


def compile_direction(local: LocalPolicy, direction: Direction) -> Compiled | None:
    """None: the direction is open, nothing is looked up."""
    clauses = [clause for clause in local.clauses if clause.direction is direction]
    ingress = direction is Direction.INGRESS
    if not (local.ingress_enforced if ingress else local.egress_enforced):
        if not clauses:
            return None
        clauses.append(Clause(direction, (), (), Action.ALLOW, RULE_OPEN))
    units = _units(clauses)
    any_peer = units.pop((), ())
    return Compiled(
        groups=frozenset(group for groups in units for group in groups),
        default=_answer(any_peer),
        any_peer=any_peer,
        units=tuple(_Unit(groups, held) for groups, held in units.items()),
    )


def _units(clauses: Iterable[Clause]) -> dict[tuple[GroupId, ...], tuple[Clause, ...]]:
    """Clauses by their groups; of those that say the same, the one with the lowest rule id."""
    found: defaultdict[tuple[GroupId, ...], dict[tuple[Action, tuple[PortRange, ...]], Clause]] = (
        defaultdict(dict)
    )
    for clause in sorted(clauses, key=attrgetter("rule_id")):
        groups = tuple(sorted(set(clause.groups)))
        found[groups].setdefault((clause.action, clause.ports), clause)
    return {groups: tuple(held.values()) for groups, held in found.items()}


def _answer(clauses: Iterable[Clause]) -> Answer:
    wide: list[Span] = []
    by_proto: defaultdict[int, list[Span]] = defaultdict(list)
    for clause in clauses:
        if not clause.ports:
            wide.append(Span(0, LAST_PORT, clause.action, clause.rule_id))
        for ports in clause.ports:
            by_proto[ports.proto].append(Span(ports.lo, ports.hi, clause.action, clause.rule_id))
    fallback = decide(wide) if wide else NO_ANSWER
    exact: list[ExactPort] = []
    ranges: list[PortBlock] = []
    for proto, spans in sorted(by_proto.items()):
        for port, bits, answer in blocks(steps(spans + wide), fallback):
            if bits == PORT_BITS:
                exact.append(ExactPort(proto, port, answer))
            else:
                ranges.append(PortBlock(proto, port, bits, answer))
    return Answer(fallback, tuple(sorted(exact)), tuple(sorted(ranges)))
