"""Tables in memory that are written row by row, with a look in before each row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Generic, TypeVar

from datapath.maps.table import MemoryTable, Page
from datapath.maps.tables import CODECS, Tables

K = TypeVar("K")
V = TypeVar("V")


class Killed(BaseException):
    """The agent, between two rows."""


class WatchedTable(Generic[K, V]):
    """`before_row` may raise; what was written by then stays."""

    def __init__(self, table: MemoryTable[K, V], before_row: Callable[[], None]) -> None:
        self._table = table
        self._before_row = before_row
        self._key, self._value = (codec.size for codec in CODECS[table.name])

    @property
    def name(self) -> str:
        return self._table.name

    @property
    def max_entries(self) -> int:
        return self._table.max_entries

    def get(self, key: K) -> V | None:
        return self._table.get(key)

    def put_many(self, rows: Mapping[K, V] | Iterable[tuple[K, V]]) -> None:
        for key, value in rows.items() if isinstance(rows, Mapping) else rows:
            self._before_row()
            self._table.put_many({key: value})

    def put_packed(self, keys: bytes, values: bytes, count: int) -> None:
        k, v = self._key, self._value
        for at in range(count):
            self._before_row()
            row = keys[at * k : at * k + k], values[at * v : at * v + v]
            self._table.put_packed(*row, 1)

    def delete_many(self, keys: Iterable[K]) -> int:
        found = 0
        for key in keys:
            self._before_row()
            found += self._table.delete_many([key])
        return found

    def delete_packed(self, keys: bytes, count: int) -> int:
        found = 0
        for at in range(count):
            self._before_row()
            found += self._table.delete_packed(keys[at * self._key : (at + 1) * self._key], 1)
        return found

    def items(self) -> Iterator[tuple[K, V]]:
        return self._table.items()

    def items_packed(self) -> Iterator[Page]:
        return self._table.items_packed()

    def count(self) -> int:
        return self._table.count()


def watched(tables: Tables, before_row: Callable[[], None]) -> Tables:
    """The same rows, seen while they are written."""
    made: dict[str, Any] = {
        each.name: WatchedTable(getattr(tables, each.name), before_row) for each in fields(tables)
    }
    return Tables(**made)
