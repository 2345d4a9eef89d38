"""Policy slots: what one direction of one local identity answers its peers, and under which number.

    Compiled + group members --build--> a slot under a fresh number, flipped to when written
    slot + changed members   --amend--> the same number, single rows changed in place

Pure: a slot is a value, a `Step` says what must be written to get from one to the next. Whoever
applies steps keeps `before` in force until `after` is in the tables.

When must the slot's revision rise? Conntrack caches a verdict only when it is ALLOW, with the rule
that gave it, and believes it while slot and revision are unchanged. So a row may change silently
exactly when every (protocol, port) that the old answer allowed is allowed by the new one, by the
same rule: `extends`. The old answer of an identity without a row is the default one (identity 0's),
so a first row for an identity can need a revision too, namely when it denies, or attributes to
another rule, what everyone is allowed. A revision too many costs each flow one lookup; one too few
is a hole. Rows are written before the revision: a packet judged in between is judged again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from pyroaring import BitMap

from datapath.agent.classes import Classes
from datapath.reconcile import PeerPut, union
from identity.numbers import NumericIdentity
from services.policy.blocks import LAST_PORT
from services.policy.clauses import RULE_OPEN, Direction, GroupId
from services.policy.compile import Answer, Compiled, PortAnswer, Verdict
from services.runtime.errors import Exhausted

EVERYONE = 0
SlotKey = tuple[NumericIdentity, Direction]
MembersOf = Callable[[GroupId], BitMap]

# No clause names this protocol number (IANA: reserved), so it shows the answer for "all others".
_OTHER_PROTO = 255
_OPEN = Answer(PortAnswer(Verdict.ALLOW, RULE_OPEN), (), ())


class Kind(Enum):
    BUILD = "build"
    AMEND = "amend"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Slot:
    """`rows`: answer -> identities that have a row of their own. `held`: every identity with a row
    in the table, 0 included. `compiled` None: taken over from the kernel, its clauses unknown."""

    number: int
    compiled: Compiled | None
    rows: Mapping[Answer, BitMap]
    held: BitMap
    classes: frozenset[int]


@dataclass(frozen=True, slots=True)
class Step:
    """From `before` to `after`. `puts` first; `removed` (in place, AMEND only) after the new
    addresses are known; `judge_again`: cached verdicts may be wrong by now."""

    key: SlotKey
    kind: Kind
    before: Slot | None
    after: Slot | None
    puts: tuple[PeerPut, ...] = ()
    removed: BitMap = field(default_factory=BitMap)
    judge_again: bool = False


def build(number: int, compiled: Compiled, members: MembersOf, classes: Classes) -> Slot:
    """The slot from scratch."""
    rows = compiled.partition(members)
    return Slot(
        number=number,
        compiled=compiled,
        rows=rows,
        held=union((*rows.values(), BitMap([EVERYONE]))),
        classes=frozenset(classes.number(answer) for answer in (*rows, compiled.default)),
    )


def lingering(fresh: Slot, before: Slot | None, left: BitMap, classes: Classes) -> Slot:
    """`fresh`, but answering the identities `left` as `before` did."""
    assert fresh.compiled is not None
    if before is not None and before.compiled is None:
        return fresh  # its answers are not known
    old: dict[Answer, BitMap] = {}
    if before is not None and before.compiled is not None:
        old = {answer: some for answer, ids in before.rows.items() if (some := ids & left)}
    rest = left - union(old.values())
    if rest:
        default = before.compiled.default if before and before.compiled else _OPEN
        old[default] = old.get(default, _NOBODY) | rest
    rows = {answer: some for answer, ids in fresh.rows.items() if (some := ids - left)}
    for answer, ids in old.items():
        if answer != fresh.compiled.default:
            rows[answer] = rows.get(answer, _NOBODY) | ids
    return Slot(
        number=fresh.number,
        compiled=fresh.compiled,
        rows=rows,
        held=union((*rows.values(), BitMap([EVERYONE]))),
        classes=frozenset(classes.number(answer) for answer in (*rows, fresh.compiled.default)),
    )


def peer_rows(slot: Slot, classes: Classes) -> tuple[PeerPut, ...]:
    """All rows of a slot. Answers that share a row share a put."""
    assert slot.compiled is not None
    everyone = PeerPut(slot.number, classes.peer_row(slot.compiled.default), BitMap([EVERYONE]))
    own = (
        PeerPut(slot.number, classes.peer_row(answer), identities)
        for answer, identities in slot.rows.items()
    )
    return (everyone, *own)


def amend(
    key: SlotKey, slot: Slot, members: MembersOf, within: BitMap, classes: Classes
) -> Step | None:
    """`within`: the identities whose membership changed. None: their answers did not change."""
    compiled = slot.compiled
    assert compiled is not None
    if not within:
        return None
    found = compiled.partition(members, within)
    now = {answer: ids for answer, ids in found.items() if answer != compiled.default}
    puts = tuple(
        PeerPut(slot.number, classes.peer_row(answer), missing)
        for answer, ids in now.items()
        if (missing := ids - slot.rows.get(answer, _NOBODY))
    )
    removed = (slot.held & within) - union(now.values())
    if not puts and not removed:
        return None
    rows = {answer: left for answer, ids in slot.rows.items() if (left := ids - within)}
    for answer, ids in now.items():
        rows[answer] = rows.get(answer, _NOBODY) | ids
    after = Slot(
        number=slot.number,
        compiled=compiled,
        rows=rows,
        held=(slot.held - removed) | union(now.values()),
        classes=frozenset(classes.number(answer) for answer in (*rows, compiled.default)),
    )
    judge_again = _less_permissive(slot, compiled.default, found)
    return Step(key, Kind.AMEND, slot, after, puts, removed, judge_again)


def _less_permissive(slot: Slot, default: Answer, found: Mapping[Answer, BitMap]) -> bool:
    """Whether any identity goes from an answer to one that does not extend it."""
    for new, identities in found.items():
        rowless = identities - slot.held
        if rowless and not extends(default, new):
            return True
        for old, had in slot.rows.items():
            if had.intersect(identities) and not extends(old, new):
                return True
    return False


def extends(old: Answer, new: Answer) -> bool:
    """Whether everything `old` allows is allowed by `new`, by the same rule."""
    if old == new:
        return True
    protos = {row.proto for answer in (old, new) for row in answer.ports}
    protos |= {row.proto for answer in (old, new) for row in answer.ranges}
    if not _kept(old.lookup(_OTHER_PROTO, 0), new.lookup(_OTHER_PROTO, 0)):
        return False
    return all(
        _kept(old.lookup(proto, port), new.lookup(proto, port))
        for proto in protos
        for port in _edges(proto, old, new)
    )


def _kept(old: PortAnswer, new: PortAnswer) -> bool:
    return old.verdict is not Verdict.ALLOW or old == new


def _edges(proto: int, *answers: Answer) -> set[int]:
    """Ports at which any of the answers may change; between two of them none does."""
    edges = {0}
    for answer in answers:
        for exact in answer.ports:
            if exact.proto == proto:
                edges |= {exact.port, exact.port + 1}
        for block in answer.ranges:
            if block.proto == proto:
                edges |= {block.port, block.port + (1 << 16 - block.bits)}
    return {edge for edge in edges if edge <= LAST_PORT}


_NOBODY = BitMap()


class SlotNumbers:
    """Free slot numbers, handed out round and round: the one freed last is reused last."""

    def __init__(self, size: int) -> None:
        """`size`: rows of the slot array; number 0 means "open" and is never handed out."""
        self._size = size
        self._used: set[int] = set()
        self._last = 0

    def __len__(self) -> int:
        return len(self._used)

    def take(self) -> int:
        if len(self._used) >= self._size - 1:
            raise Exhausted(
                f"all {self._size - 1} policy slots are in use: "
                "raise [agent] policy_slots_max and restart the agent"
            )
        number = self._last
        while True:
            number = number % (self._size - 1) + 1
            if number not in self._used:
                break
        self._used.add(number)
        self._last = number
        return number

    def adopt(self, number: int) -> None:
        """A number the tables already use."""
        self._used.add(number)

    def free(self, number: int) -> None:
        self._used.discard(number)
