"""How old the policy is that this node enforces, and what follows from that.

While policyd is connected it is of now. Without it, it grows old from the moment of the last word;
across restarts that moment is the time of the view's checkpoint, which the keeper touches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from opentelemetry.metrics import CallbackOptions, Observation

from services.runtime.clock import Clock
from services.runtime.errors import Retry
from services.runtime.metrics import meter

REPORT: Final = "report"
REFUSE: Final = "refuse"


@dataclass(frozen=True, slots=True)
class Staleness:
    """`heard_s`: wall time of the last word from policyd; 0: there never was one. `after_s` 0: it
    is never stale. `when_stale`: `report` it, or also `refuse` new endpoints."""

    heard_s: Callable[[], float]
    clock: Clock
    after_s: float = 0
    when_stale: str = REPORT

    @property
    def age_s(self) -> float:
        heard_s = self.heard_s()
        return max(0.0, self.clock.now_s() - heard_s) if heard_s else 0.0

    @property
    def is_stale(self) -> bool:
        return 0 < self.after_s < self.age_s

    def words(self) -> str:
        """Empty while it is not stale."""
        if not self.is_stale:
            return ""
        return (
            f"policy is {self.age_s:.0f} s old, more than [agent] stale_after_s ({self.after_s:g})"
        )

    def admit(self) -> None:
        """Raises `Retry` when no endpoint may be made now."""
        if self.when_stale == REFUSE and self.is_stale:
            raise Retry(f"{self.words()}, and when_stale = {REFUSE}: bring policyd back")

    def observe(self) -> None:
        """Registers the metric."""

        def read(_options: CallbackOptions) -> Iterable[Observation]:
            yield Observation(self.age_s)

        meter("tessera.agent").create_observable_gauge(
            "tessera_agent_policy_age_seconds", [read], description="Since the last word of policyd"
        )
