"""Which identities does each selector choose, kept up to date as either side changes.

    identities ──► Postings: label -> identities ──► a new selector is a few bitmap operations
    selectors  ──► buckets: label -> selectors   ──► a new identity meets only candidates

A selector is filed under its most selective requirement that demands a key: with values, once per
value (an identity has one value per key, so it meets the selector once); else under the key.
Selectors that demand nothing are candidates always.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

from pyroaring import BitMap

from identity.labels import ANY, Label, Labels
from identity.numbers import NumericIdentity
from identity.selector import POSITIVE, Operator, Requirement, Selector

# Up to this many new identities are entered and matched one by one; bitmap operations on whole
# batches cost more than they save below it.
_FEW: Final = 8

K = TypeVar("K")

# Key and value, or key and None for "has the key"; _ALWAYS is no key.
_Bucket = tuple[str, str | None]
_ALWAYS: Final[_Bucket] = ("", None)


class Postings:
    """Label -> identities, and the evaluation of selectors over it."""

    __slots__ = ("_by_key", "_by_sourced_key", "_by_value", "everyone")

    def __init__(self) -> None:
        self.everyone = BitMap()
        self._by_value: dict[tuple[str, str], BitMap] = {}
        self._by_key: dict[str, BitMap] = {}
        # With (key, value) this answers (source, key, value) too: a set holds a key once.
        self._by_sourced_key: dict[tuple[str, str], BitMap] = {}

    def add(self, identities: Mapping[NumericIdentity, Labels]) -> None:
        if len(identities) <= _FEW:
            self._add_each(identities)
            return
        grouped: defaultdict[Label, list[NumericIdentity]] = defaultdict(list)
        for number, labels in identities.items():
            for label in labels:
                grouped[label].append(number)
        self.everyone.update(identities)
        # Many labels hold few identities each, few keys hold many: keys are united once.
        of_key: defaultdict[tuple[str, str], list[NumericIdentity]] = defaultdict(list)
        for (source, key, value), numbers in grouped.items():
            _unite(self._by_value, (key, value), numbers)
            of_key[source, key] += numbers
        for (source, key), numbers in of_key.items():
            _unite(self._by_key, key, numbers)
            _unite(self._by_sourced_key, (source, key), numbers)

    def _add_each(self, identities: Mapping[NumericIdentity, Labels]) -> None:
        for number, labels in identities.items():
            self.everyone.add(number)
            for source, key, value in labels:
                _insert(self._by_value, (key, value), number)
                _insert(self._by_key, key, number)
                _insert(self._by_sourced_key, (source, key), number)

    def remove(self, number: NumericIdentity, labels: Labels) -> None:
        self.everyone.discard(number)
        for source, key, value in labels:
            _drop(self._by_value, (key, value), number)
            _drop(self._by_key, key, number)
            _drop(self._by_sourced_key, (source, key), number)

    def evaluate(self, selector: Selector) -> BitMap:
        """The identities that `selector` chooses; the caller owns the result."""
        demanded: list[BitMap] = []
        refused: list[BitMap] = []
        for requirement in selector.requirements:
            found = self._holders(requirement)
            if requirement.operator not in POSITIVE:
                refused.append(BitMap.intersection(*found))
            elif all(found):
                demanded += found
            else:
                return BitMap()
        if len(demanded) > 1:
            demanded.sort(key=len)
        chosen = demanded[0] if demanded else self.everyone
        # In place, an intersection would keep room for what it started from, kilobytes each.
        for holders in demanded[1:]:
            chosen = chosen & holders
        if len(demanded) < 2:
            chosen = chosen.copy()
        for holders in refused:
            chosen -= holders
        return chosen

    def count(self, key: str, value: str | None) -> int:
        """How many identities hold the key, with that value unless it is None."""
        held = self._by_key.get(key) if value is None else self._by_value.get((key, value))
        return 0 if held is None else len(held)

    def _holders(self, requirement: Requirement) -> tuple[BitMap, ...]:
        """Who is in all of these has the key and, if values are named, one of them.

        Not to be changed.
        """
        key, source, values = requirement.key, requirement.source, requirement.values
        if requirement.operator in (Operator.EXISTS, Operator.DOES_NOT_EXIST):
            if source == ANY:
                return (self._by_key.get(key, _NOBODY),)
            return (self._by_sourced_key.get((source, key), _NOBODY),)
        if len(values) == 1:
            found = self._by_value.get((key, values[0]), _NOBODY)
        else:
            held = (self._by_value.get((key, value)) for value in values)
            found = BitMap.union(_NOBODY, *(bitmap for bitmap in held if bitmap is not None))
        if source == ANY or not found:
            return (found,)
        return found, self._by_sourced_key.get((source, key), _NOBODY)


_NOBODY: Final = BitMap()


def _unite(held: dict[K, BitMap], at: K, numbers: list[NumericIdentity]) -> None:
    known = held.get(at)
    if known is None:
        held[at] = BitMap(numbers)
    elif len(numbers) <= _FEW:
        for number in numbers:
            known.add(number)
    else:
        known |= BitMap(numbers)


def _insert(held: dict[K, BitMap], at: K, number: NumericIdentity) -> None:
    known = held.get(at)
    if known is None:
        held[at] = BitMap((number,))
    else:
        known.add(number)


def _drop(held: dict[K, BitMap], at: K, number: NumericIdentity) -> None:
    numbers = held[at]
    numbers.discard(number)
    if not numbers:
        del held[at]


@dataclass(slots=True, eq=False)
class _Entry:
    """A selector, who it chooses, and what is left to check once its bucket was met."""

    selector: Selector
    members: BitMap
    users: int = 1
    buckets: tuple[_Bucket, ...] = (_ALWAYS,)
    # (key, value), or (source, key, value) where the source counts: all of them are needed.
    needed: frozenset[tuple[str, ...]] = frozenset()
    rest: tuple[Requirement, ...] = field(default=())

    def chooses(self, labels: Labels, held: set[tuple[str, ...]]) -> bool:
        if not self.needed <= held:
            return False
        return not self.rest or all(requirement.matches(labels) for requirement in self.rest)


class SelectorIndex:
    """Selector <-> identity sets. Bitmaps handed out are live or shared: read, never change."""

    def __init__(self) -> None:
        self._labels: dict[NumericIdentity, Labels] = {}
        self._postings = Postings()
        self._entries: dict[Selector, _Entry] = {}
        self._buckets: dict[_Bucket, dict[Selector, _Entry]] = {}
        self._filed_at = 0

    # -------------------------------------------------------------- identities

    def add_identities(
        self, identities: Mapping[NumericIdentity, Labels]
    ) -> dict[Selector, BitMap]:
        """Who was added to which selector. An identity known with the same labels is skipped.

        Raises `ValueError` for one known with other labels: that is a `relabel`.
        """
        fresh = {n: labels for n, labels in identities.items() if not self._knows(n, labels)}
        if not fresh:
            return {}
        self._labels.update(fresh)
        if len(fresh) > _FEW:
            batch = Postings()
            batch.add(fresh)
            added = self._evaluate_batch(batch, fresh.values())
        else:
            added = self._match_each(fresh)
        self._postings.add(fresh)
        self._refile_when_grown()
        return added

    def remove_identities(self, numbers: Iterable[NumericIdentity]) -> dict[Selector, BitMap]:
        """Who was removed from which selector. Unknown numbers are skipped."""
        gone = {n: labels for n in numbers if (labels := self._labels.pop(n, None)) is not None}
        leaving = BitMap(gone)
        removed: dict[Selector, BitMap] = {}
        for entry in self._candidates(gone.values()):
            out = entry.members & leaving
            if out:
                entry.members -= out
                removed[entry.selector] = out
        for number, labels in gone.items():
            self._postings.remove(number, labels)
        return removed

    def relabel(
        self, number: NumericIdentity, labels: Labels
    ) -> tuple[dict[Selector, BitMap], dict[Selector, BitMap]]:
        """Gives a known or new identity other labels; returns (added, removed)."""
        if self._labels.get(number) == labels:
            return {}, {}
        removed = self.remove_identities([number])
        added = self.add_identities({number: labels})
        for selector in added.keys() & removed.keys():
            del added[selector], removed[selector]
        return added, removed

    def labels(self, number: NumericIdentity) -> Labels | None:
        return self._labels.get(number)

    def identities(self) -> Mapping[NumericIdentity, Labels]:
        """Live and read-only."""
        return self._labels

    def selectors_of(self, number: NumericIdentity) -> tuple[Selector, ...]:
        labels = self._labels.get(number)
        if labels is None:
            return ()
        return tuple(e.selector for e in self._candidates((labels,)) if number in e.members)

    # -------------------------------------------------------------- selectors

    def add_selector(self, selector: Selector) -> BitMap:
        """Its members. Counted: as many `remove_selector` calls end it."""
        entry = self._entries.get(selector)
        if entry is not None:
            entry.users += 1
            return entry.members
        entry = _Entry(selector, self._postings.evaluate(selector))
        self._entries[selector] = entry
        self._file(entry)
        return entry.members

    def remove_selector(self, selector: Selector) -> bool:
        """True when that was its last user. Raises `KeyError` for an unknown selector."""
        entry = self._entries[selector]
        entry.users -= 1
        if entry.users:
            return False
        del self._entries[selector]
        self._unfile(entry)
        return True

    def members(self, selector: Selector) -> BitMap:
        """Raises `KeyError` for an unknown selector."""
        return self._entries[selector].members

    def selectors(self) -> Iterable[Selector]:
        return self._entries.keys()

    def evaluate(self, selector: Selector) -> BitMap:
        """The members of any selector, kept or not; the caller owns the result."""
        return self._postings.evaluate(selector)

    # -------------------------------------------------------------- inside

    def _knows(self, number: NumericIdentity, labels: Labels) -> bool:
        known = self._labels.get(number)
        if known is None:
            return False
        if known != labels:
            raise ValueError(f"identity {number} is known as {known}, not {labels}: relabel it")
        return True

    def _match_each(self, fresh: Mapping[NumericIdentity, Labels]) -> dict[Selector, BitMap]:
        added: dict[Selector, BitMap] = {}
        for number, labels in fresh.items():
            held: set[tuple[str, ...]] = set(labels)
            held.update(label[1:] for label in labels)
            alone = BitMap((number,))
            for entry in self._candidates((labels,)):
                if entry.chooses(labels, held):
                    entry.members.add(number)
                    others = added.get(entry.selector)
                    added[entry.selector] = alone if others is None else others | alone
        return added

    def _evaluate_batch(self, batch: Postings, sets: Iterable[Labels]) -> dict[Selector, BitMap]:
        added: dict[Selector, BitMap] = {}
        for entry in set(self._candidates(sets)):
            chosen = batch.evaluate(entry.selector)
            if chosen:
                entry.members |= chosen
                added[entry.selector] = chosen
        return added

    def _candidates(self, sets: Iterable[Labels]) -> Iterator[_Entry]:
        """Every selector that may choose one of `sets`; for several sets, some more than once."""
        if not self._entries:
            return
        met: dict[_Bucket, None] = {_ALWAYS: None}
        for labels in sets:
            for _, key, value in labels:
                met[key, value] = None
                met[key, None] = None
        for bucket in met:
            filed = self._buckets.get(bucket)
            if filed is not None:
                yield from filed.values()

    def _file(self, entry: _Entry) -> None:
        positive = [r for r in entry.selector.requirements if r.operator in POSITIVE]
        chosen = min(positive, key=self._cost) if len(positive) > 1 else next(iter(positive), None)
        entry.buckets = _buckets_of(chosen)
        entry.needed, entry.rest = _what_is_left(entry.selector, chosen)
        for bucket in entry.buckets:
            self._buckets.setdefault(bucket, {})[entry.selector] = entry

    def _unfile(self, entry: _Entry) -> None:
        for bucket in entry.buckets:
            filed = self._buckets[bucket]
            del filed[entry.selector]
            if not filed:
                del self._buckets[bucket]

    def _cost(self, requirement: Requirement) -> tuple[int, int]:
        """How many identities, then how many selectors, meet in the buckets of `requirement`."""
        if requirement.operator is Operator.IN and len(requirement.values) == 1:
            bucket = (requirement.key, requirement.values[0])
            return self._postings.count(*bucket), len(self._buckets.get(bucket, ()))
        buckets = _buckets_of(requirement)
        return (
            sum(self._postings.count(key, value) for key, value in buckets),
            sum(len(self._buckets.get(bucket, ())) for bucket in buckets),
        )

    def _refile_when_grown(self) -> None:
        # What was selective among few identities may not be among many.
        if len(self._labels) < 2 * self._filed_at + 64:
            return
        self._filed_at = len(self._labels)
        self._buckets.clear()
        for entry in self._entries.values():
            self._file(entry)


def _buckets_of(requirement: Requirement | None) -> tuple[_Bucket, ...]:
    if requirement is None:
        return (_ALWAYS,)
    if requirement.operator is Operator.EXISTS:
        return ((requirement.key, None),)
    return tuple((requirement.key, value) for value in requirement.values)


def _what_is_left(
    selector: Selector, filed: Requirement | None
) -> tuple[frozenset[tuple[str, ...]], tuple[Requirement, ...]]:
    """What a label set that met the bucket of `filed` must still hold, and still be asked."""
    needed: list[tuple[str, ...]] = []
    rest: list[Requirement] = []
    for requirement in selector.requirements:
        if requirement is filed and requirement.source == ANY:
            continue
        if requirement.operator is Operator.IN and len(requirement.values) == 1:
            pair = (requirement.key, requirement.values[0])
            needed.append(pair if requirement.source == ANY else (requirement.source, *pair))
        else:
            rest.append(requirement)
    return frozenset(needed), tuple(rest)
