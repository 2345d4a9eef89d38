"""Which lease of the session each published key hangs on.

A lease with many keys is slow to attach to and slow to end, so a session takes another one after
KEYS_PER_LEASE. The first lease is the session; when any of them is lost, all is published again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping

KEYS_PER_LEASE = 1000


class Leases:
    def __init__(self) -> None:
        self._ids: list[int] = []
        self._of: dict[str, int] = {}
        self._held: Counter[int] = Counter()

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(self._ids)

    def begin(self, lease: int) -> None:
        """A session was opened; nothing is known to hang on another lease."""
        self._ids = [lease]
        self._of.clear()
        self._held.clear()

    async def spread(
        self, keys: Iterable[str], extend: Callable[[], Awaitable[int]]
    ) -> Mapping[int, list[str]]:
        """A lease for each key: the one it has, or one with room; `extend` gets another one."""
        found: defaultdict[int, list[str]] = defaultdict(list)
        for key in keys:
            lease = self._of.get(key)
            while lease is None:
                lease = self._with_room()
                if lease is None:
                    self._ids.append(await extend())
                else:
                    self._of[key] = lease
                    self._held[lease] += 1
            found[lease].append(key)
        return found

    def drop(self, keys: Iterable[str]) -> None:
        for key in keys:
            lease = self._of.pop(key, None)
            if lease is not None:
                self._held[lease] -= 1

    def _with_room(self) -> int | None:
        return next((i for i in self._ids if self._held[i] < KEYS_PER_LEASE), None)
