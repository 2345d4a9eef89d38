"""The ring buffer of events, drained in bulk and on a timer: the programs wake nobody.

The kernel's layout (kernel/bpf/ringbuf.c): a consumer page we write, a producer page, then the
data mapped twice in a row so that a record never wraps. Each record is an 8-byte header (length,
page offset) and one struct event; all have the same size, which is what makes the bulk read work.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from struct import Struct
from typing import Final, Protocol, Self

from datapath import bpfcall
from datapath.maps.layout import EVENT_LAYOUT, Event
from datapath.maps.tables import MAPS_DIR
from services.runtime.errors import NotFound

_HEADER: Final = 8
_RECORD: Final = Struct("=I4x" + EVENT_LAYOUT.format[1:])
_POSITION: Final = Struct("=Q")
_BUSY: Final = 1 << 31
_DISCARDED: Final = 1 << 30
_MAKE: Final = Event._make


class Ring(Protocol):
    def drain(self, limit: int) -> list[Event]:
        """Oldest first, at most `limit`; consumed."""
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

    def drain(self, limit: int) -> list[Event]:
        # The producer position is read before the data it covers; the interpreter adds no
        # reordering and x86 and s390x keep loads in order.
        (at,) = _POSITION.unpack_from(self._consumer, 0)
        (end,) = _POSITION.unpack_from(self._producer, 0)
        count = min((end - at) // _RECORD.size, limit)
        if count <= 0:
            return []
        start = self._page + at % self._size
        records = self._data[start : start + count * _RECORD.size]
        events: list[Event] = []
        taken = 0
        for record in _RECORD.iter_unpack(records):
            if record[0] & _BUSY:  # reserved on another CPU, not yet committed
                break
            taken += 1
            if not record[0] & _DISCARDED:
                events.append(_MAKE(record[1:]))
        _POSITION.pack_into(self._consumer, 0, at + taken * _RECORD.size)
        return events

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
        self._events = deque(events)

    def put(self, event: Event) -> None:
        self._events.append(event)

    def drain(self, limit: int) -> list[Event]:
        return [self._events.popleft() for _ in range(min(limit, len(self._events)))]

    def backlog(self) -> float:
        return 0.0
