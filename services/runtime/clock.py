"""Time, as a value that is passed in.

The only module that reads the machine's clocks; everything else takes a `Clock`, so that a test
can hold time still (tests/fakes/clock.py).
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    def now_s(self) -> float:
        """Wall time, seconds since the epoch. May jump."""
        ...

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary start. Never goes back."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def now_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
