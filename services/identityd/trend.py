"""How fast numbers are taken and given back, and when they run out.

    feed of changes ──► counters ──every SAMPLE_S──► samples of the last WINDOW_S

The feed holds what every replica did, so the rates are the cluster's, not this process's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from services.identityd.feed import Change, ChangeKind
from services.identityd.view import IdentityView
from services.runtime.clock import Clock

SAMPLE_S: Final = 10.0
# A shorter time foretells nothing: a start is followed by what was waiting for it.
FORESEEN_AFTER_S: Final = 60.0
WINDOW_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Rates:
    """`exhausted_in_s`: None when the free numbers do not grow fewer, or it is too soon to say."""

    window_s: float
    created_per_s: float
    collected_per_s: float
    exhausted_in_s: float | None


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    created: int
    collected: int
    free: int


class Trend:
    def __init__(self, view: IdentityView, clock: Clock) -> None:
        self._view = view
        self._clock = clock
        self._created = 0
        self._collected = 0
        self._samples: deque[_Sample] = deque(maxlen=round(WINDOW_S / SAMPLE_S) + 1)

    async def count(self) -> None:
        """Until cancelled."""
        while True:
            await self._view.until_synced()
            async for batch in self._view.feed.follow(self._view.revision):
                for change in batch:
                    self._count(change)

    async def sample(self) -> None:
        """Until cancelled."""
        await self._view.until_synced()
        while True:
            self._samples.append(self._now())
            await self._clock.sleep(SAMPLE_S)

    def rates(self) -> Rates:
        now = self._now()
        then = self._samples[0] if self._samples else now
        window_s = now.at_s - then.at_s
        if window_s <= 0:
            return Rates(0.0, 0.0, 0.0, None)
        foreseen = window_s >= FORESEEN_AFTER_S
        shrinking_per_s = (then.free - now.free) / window_s
        return Rates(
            window_s,
            (now.created - then.created) / window_s,
            (now.collected - then.collected) / window_s,
            now.free / shrinking_per_s if shrinking_per_s > 0 and foreseen else None,
        )

    def _count(self, change: Change) -> None:
        self._created += change.kind is ChangeKind.CREATED
        self._collected += change.kind is ChangeKind.DELETED

    def _now(self) -> _Sample:
        free = len(self._view.free)
        return _Sample(self._clock.monotonic_s(), self._created, self._collected, free)
