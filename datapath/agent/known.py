"""Label sets whose number this node knows, for when nobody can be asked.

A number may be used from memory while an endpoint of this node has it: nobody else may have it,
or that endpoint would be wrong already. Otherwise for as long as a number rests at least after its
last use, so that it cannot be another set's by now.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from identity.numbers import NumericIdentity

# identityd's quarantine by default; the grace before it comes on top.
REMEMBER_S: Final = 1800.0
# Label sets beyond those in use; the oldest go first.
MOST: Final = 4096

LabelTexts = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Remembered:
    """`held_s`: when identityd last confirmed this node's reference, wall-clock time."""

    labels: LabelTexts
    number: NumericIdentity
    held_s: float


class Known:
    def __init__(self, remembered: Iterable[Remembered] = ()) -> None:
        self._sets = {each.labels: each for each in remembered}

    @property
    def remembered(self) -> tuple[Remembered, ...]:
        return tuple(self._sets.values())

    def learn(self, labels: LabelTexts, number: NumericIdentity, now_s: float) -> None:
        self._sets.pop(labels, None)
        self._sets[labels] = Remembered(labels, number, now_s)
        while len(self._sets) > MOST:
            del self._sets[next(iter(self._sets))]

    def recall(
        self, labels: LabelTexts, in_use: frozenset[NumericIdentity], now_s: float
    ) -> NumericIdentity | None:
        """`in_use`: numbers that endpoints of this node have."""
        found = self._sets.get(labels)
        if found is None:
            return None
        fresh = 0 <= now_s - found.held_s <= REMEMBER_S
        return found.number if fresh or found.number in in_use else None
