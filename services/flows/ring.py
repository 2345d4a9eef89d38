"""The newest raw records in bounded memory, addressed by a sequence number that never falls.

Records arrive and stay in batches, as they came out of the kernel's ring; they are cut into single
records only when somebody reads. A reader that falls behind learns how many records it missed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Batch:
    """`first`: sequence number of the first record. `wall_offset_s`: wall clock minus the
    monotonic clock of the records, when the batch was taken."""

    first: int
    count: int
    records: bytes
    wall_offset_s: float


class RecordRing:
    def __init__(self, record_size: int, capacity: int) -> None:
        """`capacity`: records kept, rounded up to whole batches."""
        self.record_size = record_size
        self.capacity = capacity
        self._batches: deque[Batch] = deque()
        self._kept = 0
        self.next_seq = 0

    @property
    def first_seq(self) -> int:
        return self.next_seq - self._kept

    def append(self, records: bytes, wall_offset_s: float) -> None:
        count = len(records) // self.record_size
        if not count:
            return
        self._batches.append(Batch(self.next_seq, count, records, wall_offset_s))
        self.next_seq += count
        self._kept += count
        while self._kept - self._batches[0].count >= self.capacity:
            self._kept -= self._batches.popleft().count

    def since(self, seq: int) -> Iterator[tuple[int, bytes, float]]:
        """(sequence number, record, wall offset) of every kept record from `seq` on, oldest first.
        The first number yielded is above `seq` when records in between are gone."""
        for batch in tuple(self._batches):
            if batch.first + batch.count <= seq:
                continue
            size = self.record_size
            for at in range(max(0, seq - batch.first), batch.count):
                record = batch.records[at * size : (at + 1) * size]
                yield batch.first + at, record, batch.wall_offset_s
