"""What happened to identities, as etcd tells it revision by revision, judged after the fact.

    raw watch of etcd (nothing conflated) ──► Event…  ┐
    what each node was answered, and when ──► Answer… ┴─► violations(...)  one line for each

The judge knows the keys and the promises, and nothing of the code that should keep them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

ID = "cilium/state/identities/v1/id/"
IDX = "tessera/id/idx/"
REF = "tessera/id/ref/"
TOMB = "tessera/id/tomb/"
WATCHED = (ID, IDX, REF, TOMB)


@dataclass(frozen=True, slots=True)
class Event:
    """`value` None: the key was removed. `at_s`: when the recorder saw it, monotonic."""

    revision: int
    key: str
    value: str | None
    at_s: float
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A node was told that `labels` (canonical) have `number`, in a call from `asked_s` to
    `told_s`; it relied on that until `until_s`: it released the number, or its lease was last
    confirmed then."""

    node: str
    labels: str
    number: int
    asked_s: float
    told_s: float
    until_s: float


@dataclass(slots=True)
class _State:
    """The store's content, and what is remembered of what is gone."""

    ids: dict[int, str] = field(default_factory=dict)
    index: dict[str, int] = field(default_factory=dict)
    refs: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    tombs: dict[int, Event] = field(default_factory=dict)
    # Number -> labels it stood for last, and when that ended.
    before: dict[int, tuple[str, float]] = field(default_factory=dict)


def digest_of(labels: str) -> str:
    return hashlib.sha256(labels.encode()).hexdigest()[:32]


def violations(
    events: Sequence[Event], answers: Iterable[Answer], *, quarantine_s: float, slack_s: float
) -> list[str]:
    """`slack_s`: how late the recorder may have seen an event."""
    judge = _Judge(quarantine_s, slack_s)
    for revision, group in groupby(events, key=lambda event: event.revision):
        judge.transaction(revision, list(group))
    lives = judge.lives
    found = judge.found
    for answer in answers:
        found += _broken_answer(answer, lives.get(answer.number, []), slack_s)
    return found


def leftovers(events: Sequence[Event]) -> list[str]:
    """Keys that are there after everything was released and collected. Tombstones may be, on a
    lease."""
    last = {event.key: event for event in events}
    return [
        f"{key} = {event.value}"
        for key, event in sorted(last.items())
        if event.value is not None and not (key.startswith(TOMB) and event.lease)
    ]


@dataclass(slots=True)
class _Life:
    """Of one number for one label set."""

    labels: str
    from_s: float
    to_s: float = float("inf")


class _Judge:
    def __init__(self, quarantine_s: float, slack_s: float) -> None:
        self._quarantine_s = quarantine_s
        self._slack_s = slack_s
        self._state = _State()
        self.lives: defaultdict[int, list[_Life]] = defaultdict(list)
        self.found: list[str] = []

    def transaction(self, revision: int, events: list[Event]) -> None:
        """Everything of one revision happened at once."""
        state, touched = self._state, set[int]()
        buried = {_number(e.key, TOMB) for e in events if e.key.startswith(TOMB) and e.value}
        unburied = dict(state.tombs)
        # Tombstones last: whether one may go depends on what its number is given to.
        for event in sorted(events, key=lambda event: event.key.startswith(TOMB)):
            if event.key.startswith(ID):
                number = _number(event.key, ID)
                touched.add(number)
                self._identity(revision, number, event, unburied.get(number), buried)
            elif event.key.startswith(IDX):
                touched |= self._index(event)
            elif event.key.startswith(REF):
                touched.add(self._reference(event))
            elif event.key.startswith(TOMB):
                self._tomb(revision, _number(event.key, TOMB), event, state.ids)
        for number in touched:
            self.found += (f"revision {revision}: {told}" for told in self._consistent(number))

    def _identity(
        self, revision: int, number: int, event: Event, tomb: Event | None, buried: set[int]
    ) -> None:
        state = self._state
        held = state.ids.get(number)
        if event.value is None:
            if held is not None:
                del state.ids[number]
                state.before[number] = (held, event.at_s)
                self.lives[number][-1].to_s = event.at_s
                if number not in buried:
                    self._tell(revision, f"{number} was taken from '{held}' without quarantine")
            return
        if held is not None and held != event.value:
            self._tell(revision, f"{number} went from '{held}' to '{event.value}' while in use")
        if held is None:
            self._reused(revision, number, event, tomb)
            self.lives[number].append(_Life(event.value, event.at_s))
        state.ids[number] = event.value

    def _reused(self, revision: int, number: int, event: Event, tomb: Event | None) -> None:
        labels, gone_s = self._state.before.get(number, (event.value, 0.0))
        if labels == event.value:
            return
        rested_s = event.at_s - gone_s
        if tomb is not None:
            self._tell(revision, f"{number} of '{labels}' given to '{event.value}' in quarantine")
        elif rested_s < self._quarantine_s - self._slack_s:
            self._tell(revision, f"{number} of '{labels}' reused after {rested_s:.1f} s")

    def _index(self, event: Event) -> set[int]:
        digest = event.key.removeprefix(IDX)
        old = self._state.index.pop(digest, None)
        touched = set() if old is None else {old}
        if event.value is not None:
            self._state.index[digest] = int(event.value)
            touched.add(int(event.value))
        return touched

    def _reference(self, event: Event) -> int:
        number, _, node = event.key.removeprefix(REF).partition("/")
        if event.value is None:
            self._state.refs[int(number)].discard(node)
        else:
            self._state.refs[int(number)].add(node)
        return int(number)

    def _tomb(self, revision: int, number: int, event: Event, ids: dict[int, str]) -> None:
        if event.value is not None:
            self._state.tombs[number] = event
            if not event.lease:
                self._tell(revision, f"the tombstone of {number} would stay for ever")
            return
        tomb = self._state.tombs.pop(number, None)
        if tomb is None or digest_of(ids.get(number, "")) == tomb.value:
            return
        stood_s = event.at_s - tomb.at_s
        if stood_s < self._quarantine_s - self._slack_s:
            self._tell(revision, f"the tombstone of {number} stood for {stood_s:.1f} s only")

    def _consistent(self, number: int) -> Iterator[str]:
        state = self._state
        labels, nodes = state.ids.get(number), state.refs[number]
        pointing = [digest for digest, n in state.index.items() if n == number]
        if labels is None:
            if nodes:
                yield f"{number} is gone while {', '.join(sorted(nodes))} refer to it"
            if pointing:
                yield f"the index still names {number}, which is gone"
            return
        if pointing != [digest_of(labels)]:
            yield f"{number} is '{labels}', but {len(pointing)} label sets are said to have it"
        others = [n for n, each in state.ids.items() if each == labels and n != number]
        if others:
            yield f"'{labels}' has the numbers {number} and {others[0]}"

    def _tell(self, revision: int, what: str) -> None:
        self.found.append(f"revision {revision}: {what}")


def _broken_answer(answer: Answer, lives: Sequence[_Life], slack_s: float) -> Iterator[str]:
    """The number must have stood for the set when it was told, and until it was given back."""
    mine = [
        life
        for life in lives
        if life.labels == answer.labels
        and life.from_s <= answer.told_s + slack_s
        and life.to_s >= answer.asked_s - slack_s
    ]
    if not mine:
        yield f"{answer.node} was told {answer.number} for '{answer.labels}', which it was not"
    elif max(life.to_s for life in mine) < answer.until_s - slack_s:
        yield f"{answer.number} of '{answer.labels}' was taken away while {answer.node} used it"


def _number(key: str, prefix: str) -> int:
    return int(key.removeprefix(prefix))
