from __future__ import annotations

import asyncio

from services.runtime.clock import Clock, SystemClock
from tests.fakes.clock import FakeClock


async def test_a_fake_clock_wakes_sleepers_in_order_and_at_their_time() -> None:
    clock = FakeClock(now_s=100.0)
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float, again: int) -> None:
        for _ in range(again):
            await clock.sleep(seconds)
            woken.append((name, clock.monotonic_s()))

    async with asyncio.TaskGroup() as group:
        group.create_task(sleeper("slow", 3.0, 1))
        group.create_task(sleeper("quick", 1.0, 4))
        await clock.advance(2.5)
        assert woken == [("quick", 1.0), ("quick", 2.0)]
        assert clock.now_s() == 102.5
        assert clock.sleeping == 2
        await clock.advance(10)
    assert woken[2:] == [("slow", 3.0), ("quick", 3.0), ("quick", 4.0)]
    assert clock.sleeping == 0


async def test_a_cancelled_sleeper_is_forgotten() -> None:
    clock = FakeClock()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(clock.sleep(5))
        await clock.advance(1)
        task.cancel()
    assert clock.sleeping == 0
    await clock.advance(10)


async def test_the_system_clock_moves() -> None:
    clock: Clock = SystemClock()
    before = clock.monotonic_s()
    await clock.sleep(0.001)
    assert clock.monotonic_s() > before
    assert clock.now_s() > 1_700_000_000
