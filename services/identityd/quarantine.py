"""Numbers that were collected and may not stand for another label set yet.

A tombstone hangs on a lease of the store; its end vacates the number. While nearly every number is
taken, the oldest tombstones may be taken over earlier, but never before `pressed_s`: all nodes have
heard of the change by then, unless they are cut off.
"""

from __future__ import annotations

from dataclasses import dataclass

from identity.numbers import NumericIdentity
from services.store.model import Revision


@dataclass(frozen=True, slots=True)
class Tomb:
    """`digest`: of the label set that had the number. `since_s`: monotonic, when this process saw
    it; that is later than it was, never earlier."""

    digest: str
    revision: Revision
    since_s: float


class Quarantine:
    def __init__(self, pressed_s: float) -> None:
        self._pressed_s = pressed_s
        self._tombs: dict[NumericIdentity, Tomb] = {}
        # Being taken over by transactions under way.
        self._claimed: set[NumericIdentity] = set()

    def __len__(self) -> int:
        return len(self._tombs)

    def __contains__(self, number: object) -> bool:
        return number in self._tombs

    def put(self, number: NumericIdentity, tomb: Tomb) -> None:
        self.drop(number)
        self._tombs[number] = tomb

    def drop(self, number: NumericIdentity) -> None:
        self._tombs.pop(number, None)
        self._claimed.discard(number)

    def clear(self) -> None:
        self._tombs.clear()
        self._claimed.clear()

    def of(self, number: NumericIdentity) -> Tomb | None:
        return self._tombs.get(number)

    def take_oldest(self, now_s: float) -> tuple[NumericIdentity, Tomb] | None:
        """Claims the number for a transaction, which ends with `drop` or `give_back`."""
        for number, tomb in self._tombs.items():
            if tomb.since_s + self._pressed_s > now_s:
                return None
            if number not in self._claimed:
                self._claimed.add(number)
                return number, tomb
        return None

    def give_back(self, number: NumericIdentity) -> None:
        self._claimed.discard(number)
