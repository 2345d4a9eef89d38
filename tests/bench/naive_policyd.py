"""policyd without the shared log: every change is serialised for each subscriber, and all of it is
sent. What distribution costs is measured beside this (bench_distribution.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from services.policyd import main
from services.policyd.distribute import Distributor
from services.policyd.payload import Payloads
from services.policyd.subscriber import Subscription


class Everything(Subscription):
    def take(self) -> Iterator[bytes]:
        self._woken.clear()
        state = self._source.state
        self.revision = state.revision
        position, self._position = self._position, self._source.end
        if position == self._source.end and not self._asked:
            return iter(())
        self._own = _Own(self._source)
        self._source, source = self._own, self._source
        try:
            self._source.counts.updates += 1
            return iter(list(self._snapshot()))
        finally:
            self._source = source


class _Own:
    """The shared side, but for what is encoded."""

    def __init__(self, source: Distributor) -> None:
        self.state, self.counts, self.end = source.state, source.counts, source.end
        self.instance = source.instance
        self.payloads = Payloads(source.state)


if __name__ == "__main__":
    import services.policyd.distribute as distribute

    distribute.Subscription = Everything  # type: ignore[misc]  # the one place that makes them
    main.main(sys.argv[1:])
