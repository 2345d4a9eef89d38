"""One map as user space sees it: the protocol, the kernel's implementation and one in memory.

A table promises: `put_many` of rows that fit either lands or raises, with the rows before the
culprit written; deleting what is not there is no error; `items` may miss or repeat rows that
change while it runs, as the kernel's iteration does. A full table raises Exhausted, naming the
map, its size and the config key that raises it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, Protocol, TypeVar

from datapath import bpfcall
from datapath.maps.layout import Codec
from services.runtime.errors import Exhausted, NotFound, Unusable

K = TypeVar("K")
V = TypeVar("V")
Page = tuple[bytes, bytes, int]

_CHUNK: Final = 16384  # rows per call: bounds what one call copies into the kernel
_FULL: Final = frozenset({errno.E2BIG, errno.ENOSPC, errno.ENOMEM})
_ENOTSUPP: Final = 524  # kernel-internal, not in errno
_NO_BATCH: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, _ENOTSUPP})
_MAP_ARRAY: Final = 2
_MAP_PERCPU_ARRAY: Final = 6
_MAP_PERCPU_TYPES: Final = frozenset({5, _MAP_PERCPU_ARRAY, 10})


class Table(Protocol[K, V]):
    """`name`: the map's; `max_entries`: its capacity."""

    @property
    def name(self) -> str: ...
    @property
    def max_entries(self) -> int: ...
    def get(self, key: K) -> V | None: ...
    def put_many(self, rows: Mapping[K, V] | Iterable[tuple[K, V]]) -> None: ...
    def put_packed(self, keys: bytes, values: bytes, count: int) -> None: ...
    def delete_many(self, keys: Iterable[K]) -> int: ...
    def delete_packed(self, keys: bytes, count: int) -> int: ...
    def items(self) -> Iterator[tuple[K, V]]: ...
    def items_packed(self) -> Iterator[Page]:
        """Pages of (keys, values, how many rows), each row as the kernel holds it."""
        ...

    def count(self) -> int: ...


def _pairs(rows: Mapping[K, V] | Iterable[tuple[K, V]]) -> Iterable[tuple[K, V]]:
    return rows.items() if isinstance(rows, Mapping) else rows


def _full(name: str, max_entries: int, config_key: str) -> Exhausted:
    remedy = f"raise [agent] {config_key} and restart the agent" if config_key else "free rows"
    return Exhausted(f"BPF map {name} is full ({max_entries} entries): {remedy}")


def _cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


class MemoryTable(Table[K, V]):
    """A dict of packed rows: what the kernel would refuse to hold, this refuses too.

    `zero`: makes it an array, whose every row exists and is reset by a deletion.
    """

    def __init__(
        self,
        name: str,
        key: Codec[K],
        value: Codec[V],
        *,
        max_entries: int = 1 << 32,
        config_key: str = "",
        zero: V | None = None,
    ) -> None:
        self._name = name
        self._key = key
        self._value = value
        self._max = max_entries
        self._config_key = config_key
        self._zero = zero
        self._rows: dict[bytes, bytes] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def max_entries(self) -> int:
        return self._max

    def get(self, key: K) -> V | None:
        found = self._rows.get(self._key.pack(key))
        return self._zero if found is None else self._value.unpack(found)

    def put_many(self, rows: Mapping[K, V] | Iterable[tuple[K, V]]) -> None:
        pack_key, pack_value = self._key.pack, self._value.pack
        self._put((pack_key(key), pack_value(value)) for key, value in _pairs(rows))

    def put_packed(self, keys: bytes, values: bytes, count: int) -> None:
        rows = zip(_cut(keys, self._key.size), _cut(values, self._value.size), strict=True)
        if len(self._rows) + count <= self._max:
            self._rows.update(rows)
        else:
            self._put(rows)

    def _put(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        for key, value in rows:
            if key not in self._rows and len(self._rows) >= self._max:
                raise _full(self._name, self._max, self._config_key)
            self._rows[key] = value

    def delete_many(self, keys: Iterable[K]) -> int:
        return self._delete(map(self._key.pack, keys))

    def delete_packed(self, keys: bytes, count: int) -> int:
        return self._delete(_cut(keys, self._key.size))

    def _delete(self, keys: Iterable[bytes]) -> int:
        pop = self._rows.pop
        return sum(pop(key, None) is not None for key in keys)

    def items(self) -> Iterator[tuple[K, V]]:
        for key, value in list(self._rows.items()):
            yield self._key.unpack(key), self._value.unpack(value)

    def items_packed(self) -> Iterator[Page]:
        if self._rows:
            yield b"".join(self._rows), b"".join(self._rows.values()), len(self._rows)

    def count(self) -> int:
        return len(self._rows)


class KernelTable(Table[K, V]):
    """A pinned BPF map. Rows of a per-CPU map are read as the concatenation of all CPUs' rows."""

    def __init__(
        self, name: str, fd: int, key: Codec[K], value: Codec[V], config_key: str = ""
    ) -> None:
        """Takes ownership of `fd`."""
        self._name = name
        self._fd = fd
        self._key = key
        self._value = value
        self._config_key = config_key
        info = bpfcall.map_info(fd)
        if (info.key_size, info.value_size) != (key.size, value.size):
            raise Unusable(
                f"BPF map {name} holds {info.key_size}+{info.value_size} byte rows, this version "
                f"expects {key.size}+{value.size}: remove its pin and restart the agent"
            )
        self._info = info
        self._array = info.type in (_MAP_ARRAY, _MAP_PERCPU_ARRAY)
        self._stride = value.size
        if info.type in _MAP_PERCPU_TYPES:
            self._stride = (value.size + 7) // 8 * 8 * possible_cpus()
        self._batches = True

    @classmethod
    def open(
        cls, path: Path, key: Codec[K], value: Codec[V], config_key: str = ""
    ) -> KernelTable[K, V]:
        try:
            fd = bpfcall.get_pinned(path)
        except FileNotFoundError:
            raise NotFound(f"no BPF map at {path}: the agent has not run here") from None
        return cls(path.name, fd, key, value, config_key)

    @property
    def name(self) -> str:
        return self._name

    @property
    def max_entries(self) -> int:
        return self._info.max_entries

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def get(self, key: K) -> V | None:
        try:
            data = bpfcall.map_lookup(self._fd, self._key.pack(key), self._stride)
        except FileNotFoundError:
            return None
        return self._value.unpack(data)

    def put_many(self, rows: Mapping[K, V] | Iterable[tuple[K, V]]) -> None:
        keys, values = bytearray(), bytearray()
        count = 0
        for key, value in _pairs(rows):
            keys += self._key.pack(key)
            values += self._value.pack(value)
            count += 1
        self.put_packed(bytes(keys), bytes(values), count)

    def put_packed(self, keys: bytes, values: bytes, count: int) -> None:
        k, v = self._key.size, self._value.size

        def single(at: int) -> None:
            bpfcall.map_update(self._fd, keys[at * k : at * k + k], values[at * v : at * v + v])

        def batch(at: int, size: int) -> None:
            chunk = slice(at * k, (at + size) * k), slice(at * v, (at + size) * v)
            bpfcall.map_update_batch(self._fd, keys[chunk[0]], values[chunk[1]], size)

        try:
            self._each(count, single, batch, tolerate=None)
        except OSError as error:
            if error.errno in _FULL:
                raise _full(self._name, self.max_entries, self._config_key) from None
            raise

    def delete_many(self, keys: Iterable[K]) -> int:
        packed = [self._key.pack(key) for key in keys]
        return self.delete_packed(b"".join(packed), len(packed))

    def delete_packed(self, keys: bytes, count: int) -> int:
        if self._array:
            self.put_packed(keys, bytes(self._value.size * count), count)
            return count
        k = self._key.size

        def single(at: int) -> None:
            bpfcall.map_delete(self._fd, keys[at * k : at * k + k])

        def batch(at: int, size: int) -> None:
            bpfcall.map_delete_batch(self._fd, keys[at * k : (at + size) * k], size)

        return count - self._each(count, single, batch, tolerate=errno.ENOENT)

    def _each(
        self,
        count: int,
        single: Callable[[int], None],
        batch: Callable[[int, int], None],
        *,
        tolerate: int | None,
    ) -> int:
        """Runs the rows in batches, one by one where the kernel has none; counts the tolerated."""
        at = tolerated = 0
        while at < count:
            size = min(_CHUNK, count - at)
            try:
                if self._batches and size > 1:
                    batch(at, size)
                    at += size
                else:
                    single(at)
                    at += 1
            except OSError as error:
                done = error.done if isinstance(error, bpfcall.BatchError) else None
                if error.errno == tolerate:
                    tolerated += 1
                    at += (done or 0) + 1
                elif done == 0 and error.errno in _NO_BATCH:
                    self._batches = False
                else:
                    raise
        return tolerated

    def _pages(self) -> Iterator[bpfcall.Page]:
        cursor: bytes | None = None
        room = min(_CHUNK, max(self.max_entries, 64))
        while True:
            try:
                page = bpfcall.map_lookup_batch(
                    self._fd, cursor, room, self._key.size, self._stride
                )
            except OSError as error:
                if error.errno != errno.ENOSPC:  # ENOSPC: one hash bucket holds more than `room`
                    raise
                room *= 2
                continue
            yield page
            if page.cursor is None:
                return
            cursor = page.cursor

    def items(self) -> Iterator[tuple[K, V]]:
        unpack_key, unpack_value = self._key.unpack, self._value.unpack
        k, v = self._key.size, self._stride
        for keys, values, _ in self.items_packed():
            yield from zip(
                map(unpack_key, _cut(keys, k)), map(unpack_value, _cut(values, v)), strict=True
            )

    def items_packed(self) -> Iterator[Page]:
        try:
            for page in self._pages():
                if page.count:
                    yield page.keys, page.values, page.count
        except OSError as error:
            if error.errno not in _NO_BATCH:
                raise
            yield from self._walk()

    def _walk(self) -> Iterator[Page]:
        key: bytes | None = None
        while True:
            try:
                key = bpfcall.map_next_key(self._fd, key, self._key.size)
            except FileNotFoundError:
                return
            try:
                yield key, bpfcall.map_lookup(self._fd, key, self._stride), 1
            except FileNotFoundError:  # gone meanwhile
                continue

    def count(self) -> int:
        """Rows present; walks the whole map."""
        if self._array:
            return self.max_entries
        try:
            return sum(page.count for page in self._pages())
        except OSError as error:
            if error.errno not in _NO_BATCH:
                raise
            return sum(1 for _ in self._walk())


def possible_cpus() -> int:
    """How many rows the kernel keeps per key of a per-CPU map."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(text.replace(",", "-").rsplit("-", 1)[-1]) + 1
