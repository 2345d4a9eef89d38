"""The ring buffer of events, drained in bulk and on a timer: the programs wake nobody.

A drain is one copy of the records as they lie there; who wants to look at one unpacks it.

The kernel's layout (kernel/bpf/ringbuf.c): a consumer page we write, a producer page, then the
data mapped twice in a row so that a record never wraps. Each record is an 8-byte header (length,
page offset) and one struct event; all have the same size, which is what makes the bulk read work.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from struct import Struct
from typing import Final, Protocol, Self, overload

from datapath import bpfcall
from datapath.maps.layout import EVENT_LAYOUT, Event
from datapath.maps.tables import MAPS_DIR
from services.runtime.errors import NotFound

_HEADER: Final = 8
RECORD_SIZE: Final = _HEADER + EVENT_LAYOUT.size
_RECORD: Final = Struct(f"={_HEADER}x" + EVENT_LAYOUT.format[1:])
_POSITION: Final = Struct("=Q")
# The upper byte of a header's length, which no record reaches: reserved on another CPU and not
# committed yet (bit 31), or given up (bit 30).
_STATE: Final = 3
_BUSY: Final = 0x80
_DISCARDED: Final = 0x40
_MAKE: Final = Event._make


class Records(Sequence[Event]):
    """What was drained, oldest first, headers included."""

    def __init__(self, raw: bytes = b"") -> None:
        self.raw = raw

    @classmethod
    def of(cls, events: Iterable[Event]) -> Self:
        header = EVENT_LAYOUT.size.to_bytes(_HEADER, sys.byteorder)
        return cls(b"".join(header + EVENT_LAYOUT.pack(*event) for event in events))

    def __len__(self) -> int:
        return len(self.raw) // RECORD_SIZE

    def __iter__(self) -> Iterator[Event]:
        return map(_MAKE, _RECORD.iter_unpack(self.raw))

    @overload
    def __getitem__(self, at: int) -> Event: ...
    @overload
    def __getitem__(self, at: slice) -> Records: ...
    def __getitem__(self, at: int | slice) -> Event | Records:
        if isinstance(at, slice):
            return Records.of(list(self)[at])
        start = range(len(self))[at] * RECORD_SIZE
        return _MAKE(_RECORD.unpack_from(self.raw, start))


class Ring(Protocol):
    def drain(self, limit: int) -> Records:
        """At most `limit`; consumed."""
        ...


class EventRing(Ring):
    """One consumer at a time: two would both move the consumer position."""

    def __init__(self, fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self._size = size
        self._page = page
        self._consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(
            fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        )
        self._data = memoryview(self._producer)

    @classmethod
    def open(cls, path: Path) -> Self:
        """`path`: the pinned ring, <bpf_dir>/maps/events."""
        try:
            fd = bpfcall.get_pinned(path)
        except FileNotFoundError:
            raise NotFound(f"no event ring at {path}: the agent has not run here") from None
        try:
            return cls(fd, bpfcall.map_info(fd).max_entries)
        finally:
            os.close(fd)  # the mappings keep the ring

    @classmethod
    def pinned(cls, bpf_dir: Path) -> Self:
        return cls.open(bpf_dir / MAPS_DIR / "events")

    def drain(self, limit: int) -> Records:
        # The producer position is read before the data it covers; the interpreter adds no
        # reordering and x86 and s390x keep loads in order.
        (at,) = _POSITION.unpack_from(self._consumer, 0)
        (end,) = _POSITION.unpack_from(self._producer, 0)
        count = min((end - at) // RECORD_SIZE, limit)
        if count <= 0:
            return Records()
        start = self._page + at % self._size
        # States before records: one that is committed while we copy waits for the next drain.
        states = bytes(self._data[start + _STATE : start + count * RECORD_SIZE : RECORD_SIZE])
        taken = count
        if states.count(0) != count:
            taken = next((n for n, state in enumerate(states) if state & _BUSY), count)
        raw = bytes(self._data[start : start + taken * RECORD_SIZE])
        _POSITION.pack_into(self._consumer, 0, at + taken * RECORD_SIZE)
        if states.count(0, 0, taken) != taken:
            raw = b"".join(
                raw[n * RECORD_SIZE : (n + 1) * RECORD_SIZE]
                for n in range(taken)
                if not states[n] & _DISCARDED
            )
        return Records(raw)

    def backlog(self) -> float:
        """Share of the ring that waits to be drained, 0 to 1."""
        (at,) = _POSITION.unpack_from(self._consumer, 0)
        (end,) = _POSITION.unpack_from(self._producer, 0)
        share: float = (end - at) / self._size
        return share

    def close(self) -> None:
        self._data.release()
        self._producer.close()
        self._consumer.close()


class MemoryRing(Ring):
    """What a test or a simulated node puts in comes out."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.waiting = deque(events)

    def put(self, event: Event) -> None:
        self.waiting.append(event)

    def drain(self, limit: int) -> Records:
        return Records.of(self.waiting.popleft() for _ in range(min(limit, len(self.waiting))))

    def backlog(self) -> float:
        return 0.0
