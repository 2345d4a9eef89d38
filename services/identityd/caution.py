"""When collecting rests, because references may be missing that nobody gave back.

    this process just started          it has not seen what the others saw
    the store has a new leader         nodes could not renew their leases for a while
    no heartbeat                       the watch stalls: what is seen may be old
    a fifth of the references at once  their nodes went with them: failed, more likely than left

Each of them suspends collecting for one session lifetime, in which nodes return and renew.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

# References lost within the span: above the share, a failure is likelier than a scale-down.
LOSS_SPAN_S: Final = 60.0
LOSS_SHARE: Final = 0.2
FEW_REFERENCES: Final = 50
HEARTBEAT_S: Final = 60.0
# Two beats missed.
SILENCE_S: Final = 2.5 * HEARTBEAT_S


@dataclass(frozen=True, slots=True)
class Signs:
    """What there is to see. `lost`: references gone with their nodes within LOSS_SPAN_S;
    `references`: those left; `heard_s`: when a heartbeat was last seen, monotonic."""

    lost: int
    references: int
    term: int
    heard_s: float


class Losses:
    """How many references went away lately."""

    def __init__(self) -> None:
        self._batches: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, count: int, now_s: float) -> None:
        self._batches.append((now_s, count))
        self._sum += count

    def lately(self, now_s: float) -> int:
        while self._batches and self._batches[0][0] < now_s - LOSS_SPAN_S:
            self._sum -= self._batches.popleft()[1]
        return self._sum

    def clear(self) -> None:
        self._batches.clear()
        self._sum = 0


class Caution:
    def __init__(self, rest_s: float, signs: Signs, now_s: float) -> None:
        self._rest_s = rest_s
        self._resume_s = now_s + rest_s
        self._term = signs.term

    def left_s(self, now_s: float) -> float:
        """How long collecting still rests; not positive: it may go on."""
        return self._resume_s - now_s

    def alarm(self, signs: Signs, now_s: float) -> str | None:
        """Why collecting is suspended from now on, if it is."""
        reason = self._reason(signs, now_s)
        if reason is not None:
            self._resume_s = now_s + self._rest_s
        return reason

    def _reason(self, signs: Signs, now_s: float) -> str | None:
        if signs.term != self._term:
            self._term = signs.term
            return "the store has a new leader"
        if now_s - signs.heard_s > SILENCE_S:
            return "no heartbeat was seen; does the watch stall?"
        held = signs.references + signs.lost
        if signs.lost > max(FEW_REFERENCES, LOSS_SHARE * held):
            return f"{signs.lost} of {held} references vanished at once"
        return None
