"""When a pool is used up, if it goes on as it did: a straight line through the last hour."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

WINDOW_S = 3600.0
# Fewer points, or a shorter time, say nothing.
_POINTS, _SPAN_S = 5, 240.0

Sample = tuple[float, int]


@dataclass(slots=True)
class History:
    """Samples (seconds on a clock that does not go back, addresses in use), oldest first."""

    samples: deque[Sample] = field(default_factory=deque)

    def add(self, now_s: float, used: int) -> None:
        self.samples.append((now_s, used))
        while self.samples[0][0] < now_s - WINDOW_S:
            self.samples.popleft()


def slope(samples: Sequence[Sample]) -> float:
    """Addresses per second by least squares; 0 while too little is known."""
    if len(samples) < _POINTS or samples[-1][0] - samples[0][0] < _SPAN_S:
        return 0.0
    count = len(samples)
    middle_s = sum(t for t, _ in samples) / count
    middle = sum(used for _, used in samples) / count
    spread = sum((t - middle_s) ** 2 for t, _ in samples)
    return sum((t - middle_s) * (used - middle) for t, used in samples) / spread


def exhausted_in_s(used: int, capacity: int, per_second: float) -> float | None:
    """None while use does not grow."""
    left = capacity - used
    if left <= 0:
        return 0.0
    # Less than one address in the window is noise.
    return left / per_second if per_second * WINDOW_S >= 1.0 else None
