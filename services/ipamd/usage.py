"""How full the pools are, and when they will be used up."""

from __future__ import annotations

from dataclasses import dataclass

from ipam.block import Family
from ipam.forecast import History, exhausted_in_s, slope
from ipam.pool import Pool
from ipam.view import View
from services.runtime.clock import Clock

EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one family of a pool. `retained` and `used` exclude each other; `in_windows`: free, and
    only their nodes hand them out. `exhausted_in_s`: None while use does not grow."""

    family: Family
    capacity: int
    used: int
    cooling: int
    retained: int
    in_windows: int
    blocks: int
    per_hour: float
    exhausted_in_s: float | None


class Meter:
    """Samples the view; what it foretells begins with this replica."""

    def __init__(self, view: View, clock: Clock) -> None:
        self._view = view
        self._clock = clock
        self._history: dict[tuple[str, Family], History] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.sample()
            await self._clock.sleep(EVERY_S)

    def sample(self) -> None:
        now_s = self._clock.monotonic_s()
        kept: dict[tuple[str, Family], History] = {}
        for pool in self._view.pools():
            for family in pool.families:
                history = self._history.get((pool.name, family), History())
                history.add(now_s, self._view.used(pool.name, family))
                kept[pool.name, family] = history
        self._history = kept

    def forecast(self, pool: Pool, family: Family) -> tuple[float, float | None]:
        """(addresses per hour, seconds until none is left)."""
        history = self._history.get((pool.name, family))
        per_second = slope(history.samples) if history is not None else 0.0
        used, capacity = self._view.used(pool.name, family), pool.capacity(family)
        return per_second * 3600, exhausted_in_s(used, capacity, per_second)

    def usage(self, pool: Pool) -> list[Usage]:
        retained = self._retained(pool.name)
        found = []
        for family in pool.families:
            blocks = [c for c in self._view.blocks_of(pool.name) if c.block.family is family]
            per_hour, exhausted = self.forecast(pool, family)
            kept = retained.get(family, 0)
            found.append(
                Usage(
                    family=family,
                    capacity=pool.capacity(family),
                    used=self._view.used(pool.name, family) - kept,
                    cooling=self._view.cooling(pool.name, family),
                    retained=kept,
                    in_windows=sum(self._view.window_room(c) for c in blocks if c.window),
                    blocks=len(blocks),
                    per_hour=per_hour,
                    exhausted_in_s=exhausted,
                )
            )
        return found

    def _retained(self, pool: str) -> dict[Family, int]:
        found: dict[Family, int] = {}
        for row in self._view.retained():
            if row.pool == pool:
                family = row.block.family
                found[family] = found.get(family, 0) + 1
        return found
