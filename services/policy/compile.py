"""Compilation of one local policy: which answer each peer identity gets, on which ports.

    LocalPolicy --compile_direction--> Compiled --partition(group members)--> {Answer: identities}

An answer is the content of one class of the datapath. Precedence is decided here, for each class
and each distinct port block, so that the kernel never ranks rules: any deny -> DENY; else any allow
with L7 -> REDIRECT; else any allow -> ALLOW; else NONE. Tiers and authentication are in ranked.py.
Nothing here knows maps, slots or class numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Final

from pyroaring import BitMap

from services.policy.blocks import (
    LAST_PORT,
    NO_ANSWER,
    PORT_BITS,
    PortAnswer,
    Span,
    Step,
    Verdict,
    blocks,
    decide,
    steps,
)
from services.policy.clauses import (
    Clause,
    Direction,
    GroupId,
    LocalPolicy,
    NamedPort,
    PortRange,
)
from services.policy.ranked import DEFAULT_DENY, Claim, is_plain, ranked_steps

__all__ = [
    "Answer",
    "Compiled",
    "ExactPort",
    "PortAnswer",
    "PortBlock",
    "PortNames",
    "Verdict",
    "compile_direction",
    "numbered",
]


# What the port names of clauses stand for at one endpoint; a name that is missing is unresolved.
PortNames = Mapping[NamedPort, int]
_NO_NAMES: Final[PortNames] = {}


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
    `isolated`: the NETWORK_POLICY tier is final.
    """

    groups: frozenset[GroupId]
    default: Answer
    any_peer: tuple[Clause, ...]
    units: tuple[_Unit, ...]
    isolated: bool = True

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
            clauses = [clause for n in matching for clause in self.units[n].clauses]
            answer = _answer([*self.any_peer, *clauses], isolated=self.isolated)
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


def compile_direction(
    local: LocalPolicy, direction: Direction, names: PortNames = _NO_NAMES
) -> Compiled | None:
    """None: the direction is open, nothing is looked up."""
    clauses = [
        clause
        for written in local.clauses
        if written.direction is direction
        for clause in numbered(written, names)
    ]
    ingress = direction is Direction.INGRESS
    isolated = local.ingress_enforced if ingress else local.egress_enforced
    if not isolated and not clauses:
        return None
    units = _units(clauses)
    any_peer = units.pop((), ())
    return Compiled(
        groups=frozenset(group for groups in units for group in groups),
        default=_answer(any_peer, isolated=isolated),
        any_peer=any_peer,
        units=tuple(_Unit(groups, held) for groups, held in units.items()),
        isolated=isolated,
    )


def numbered(clause: Clause, names: PortNames) -> Iterator[Clause]:
    """The clause with numbers for its port names; nothing when that leaves it no port."""
    if not clause.names:
        yield clause
        return
    known = (PortRange(n.proto, names[n], names[n]) for n in clause.names if n in names)
    ports = tuple(sorted({*clause.ports, *known}))
    if ports:
        yield replace(clause, ports=ports, names=())


def _units(clauses: Iterable[Clause]) -> dict[tuple[GroupId, ...], tuple[Clause, ...]]:
    """Clauses by their groups; of those that say the same, the one with the lowest rule id."""
    found: defaultdict[tuple[GroupId, ...], dict[object, Clause]] = defaultdict(dict)
    for clause in sorted(clauses, key=attrgetter("rule_id")):
        groups = tuple(sorted(set(clause.groups)))
        c = clause
        said = (c.action, c.ports, c.names, c.proxy, c.auth, c.tier, c.order)
        found[groups].setdefault(said, clause)
    return {groups: tuple(held.values()) for groups, held in found.items()}


def _answer(clauses: Sequence[Clause], *, isolated: bool) -> Answer:
    if isolated and all(map(is_plain, clauses)):
        return _plain_answer(clauses)
    return _ranked_answer(clauses, isolated=isolated)


def _plain_answer(clauses: Iterable[Clause]) -> Answer:
    wide: list[Span] = []
    by_proto: defaultdict[int, list[Span]] = defaultdict(list)
    for clause in clauses:
        if not clause.ports:
            wide.append(Span(0, LAST_PORT, clause.action, clause.rule_id))
        for ports in clause.ports:
            by_proto[ports.proto].append(Span(ports.lo, ports.hi, clause.action, clause.rule_id))
    fallback = decide(wide) if wide else NO_ANSWER
    stepped = {proto: steps(spans + wide) for proto, spans in by_proto.items()}
    return _rows(fallback, stepped)


def _ranked_answer(clauses: Iterable[Clause], *, isolated: bool) -> Answer:
    wide: list[Claim] = []
    by_proto: defaultdict[int, list[Claim]] = defaultdict(list)
    for clause in clauses:
        if not clause.ports:
            wide.append(Claim(0, LAST_PORT, clause, anywhere=True))
        for ports in clause.ports:
            by_proto[ports.proto].append(Claim(ports.lo, ports.hi, clause))
    ((_, fallback),) = ranked_steps(wide, isolated=isolated)
    stepped = {}
    for proto, claims in by_proto.items():
        found = ranked_steps([*claims, *wide], isolated=isolated)
        if fallback is not NO_ANSWER:
            # A row must say what the fallback would get wrong.
            found = [(at, DEFAULT_DENY if a == NO_ANSWER else a) for at, a in found]
        stepped[proto] = found
    return _rows(fallback, stepped)


def _rows(fallback: PortAnswer, stepped: Mapping[int, Sequence[Step]]) -> Answer:
    exact: list[ExactPort] = []
    ranges: list[PortBlock] = []
    for proto, found in sorted(stepped.items()):
        for port, bits, answer in blocks(found, fallback):
            if bits == PORT_BITS:
                exact.append(ExactPort(proto, port, answer))
            else:
                ranges.append(PortBlock(proto, port, bits, answer))
    return Answer(fallback, tuple(sorted(exact)), tuple(sorted(ranges)))
