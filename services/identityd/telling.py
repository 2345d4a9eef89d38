"""The log of new identities: a line for each, and in a burst a line for many.

A line costs as much as an allocation does, so a burst would spend half its time on the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.runtime.clock import Clock
from services.runtime.log import logger

log = logger(__name__)

LINES_PER_S: Final = 20


class Telling:
    """Those beyond LINES_PER_S are told by their count, with the first one of a later second."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_s = clock.monotonic_s()
        self._lines = 0
        self._untold = 0

    def created(self, node: str, created: Sequence[tuple[NumericIdentity, Labels]]) -> None:
        now_s = self._clock.monotonic_s()
        if now_s - self._began_s >= 1.0:
            if self._untold:
                log.info("identity.allocated", count=self._untold)
            self._began_s, self._lines, self._untold = now_s, 0, 0
        if self._lines + len(created) > LINES_PER_S:
            self._untold += len(created)
            return
        self._lines += len(created)
        for number, labels in created:
            log.info("identity.allocated", identity=number, labels=labels.canonical(), node=node)
