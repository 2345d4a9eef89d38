"""The newest records in bounded memory, addressed by a sequence number that never falls.

Records arrive and stay in batches, as they were drained from the kernel; they are spelled out only
when somebody reads. A reader that falls behind learns how many records it missed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Batch(Generic[T]):
    first: int
    records: Sequence[T]
    wall_offset_s: float


class RecordRing(Generic[T]):
    """`wall_offset_s` of a batch: wall clock minus the clock of its records, when it was taken."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: records kept at least; up to one batch more are."""
        self._capacity = capacity
        self._batches: deque[_Batch[T]] = deque()
        self._kept = 0
        self.next_seq = 0

    @property
    def first_seq(self) -> int:
        """Of the oldest record kept."""
        return self.next_seq - self._kept

    def append(self, records: Sequence[T], wall_offset_s: float) -> None:
        if not records:
            return
        self._batches.append(_Batch(self.next_seq, records, wall_offset_s))
        self.next_seq += len(records)
        self._kept += len(records)
        while self._kept - len(self._batches[0].records) >= self._capacity:
            self._kept -= len(self._batches.popleft().records)

    def since(self, seq: int) -> Iterator[tuple[int, T, float]]:
        """(sequence number, record, wall offset) of every kept record from `seq` on, oldest first.
        The first number is above `seq` when records in between are gone."""
        for batch in tuple(self._batches):
            for at in range(max(0, seq - batch.first), len(batch.records)):
                yield batch.first + at, batch.records[at], batch.wall_offset_s

    def latest(self) -> Iterator[tuple[int, T, float]]:
        """As `since(0)`, newest first."""
        for batch in reversed(tuple(self._batches)):
            for at in range(len(batch.records) - 1, -1, -1):
                yield batch.first + at, batch.records[at], batch.wall_offset_s
