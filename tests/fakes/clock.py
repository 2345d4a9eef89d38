"""A clock that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import heapq

# How often the loop may turn between two wake-ups: a woken task, the tasks it wakes, and theirs.
TURNS = 20


class FakeClock:
    def __init__(self, now_s: float = 1_700_000_000.0) -> None:
        self._now_s = now_s
        self._start_s = now_s
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    def now_s(self) -> float:
        return self._now_s

    def monotonic_s(self) -> float:
        return self._now_s - self._start_s

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        self._count += 1
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_s + seconds, self._count, future))
        await future

    @property
    def sleeping(self) -> int:
        """Tasks that wait for this clock."""
        return sum(not future.done() for _, _, future in self._sleepers)

    async def advance(self, seconds: float) -> None:
        """Move time, waking sleepers one by one in order of their deadlines; whatever a woken task
        starts to sleep for within the span is woken too."""
        await self._turn()
        target = self._now_s + seconds
        while self._sleepers and self._sleepers[0][0] <= target:
            deadline, _, future = heapq.heappop(self._sleepers)
            if future.done():
                continue
            self._now_s = max(self._now_s, deadline)
            future.set_result(None)
            await self._turn()
        self._now_s = target
        await self._turn()

    async def _turn(self) -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)
