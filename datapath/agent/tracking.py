"""Tracked flows that are over are taken out of the table, a page at a time, and its fill is told.

The programs do not believe an entry that was idle for too long, but leave it; without a sweep only
the table's own eviction would remove it, and the fill would say nothing. A pass walks the whole
table in pages; between two of them everybody else has a turn. The timeouts are the programs'
(bpf/conntrack.h), and a while more: an entry that comes to life between the look at it and its
removal costs its flow one judgement.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
from opentelemetry.metrics import CallbackOptions, Observation

from datapath.maps.flows import CtEntry, CtFlags, CtKey
from datapath.maps.table import Table
from services.runtime.clock import Clock
from services.runtime.log import logger
from services.runtime.metrics import meter

log = logger(__name__)

SWEEP_PAUSE_S: Final = 30.0
GRACE_S: Final = 10.0
# Above this share the next sweep comes sooner, and it is said once.
PRESSED: Final = 0.8
PRESSED_PAUSE_S: Final = 5.0

_TCP, _ICMP, _ICMP6 = 6, 1, 58
_TCP_ESTABLISHED_S, _TCP_SYN_S, _TCP_CLOSING_S = 21600, 60, 10
_ONE_WAY_S, _BOTH_WAYS_S, _ICMP_S = 60, 180, 30

_KEYS: Final = np.dtype({"names": ["proto"], "formats": ["u1"], "offsets": [36], "itemsize": 40})
_ENTRIES: Final = np.dtype(
    {
        "names": ["seen", "flags"],
        "formats": ["<u8", "<u4"],
        "offsets": [0, 40],
        "itemsize": CtEntry.LAYOUT.size,
    }
)


def expired(keys: bytes, entries: bytes, now_ns: int) -> list[bytes]:
    """The keys, of packed rows, whose flows nobody believes in any more."""
    proto = np.frombuffer(keys, dtype=_KEYS)["proto"]
    rows = np.frombuffer(entries, dtype=_ENTRIES)
    flags = rows["flags"]

    def has(flag: CtFlags) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        found: np.ndarray[tuple[int], np.dtype[np.bool_]] = (flags & flag) != 0
        return found

    tcp, icmp = proto == _TCP, (proto == _ICMP) | (proto == _ICMP6)
    closing = has(CtFlags.RST) | (has(CtFlags.FIN_FWD) & has(CtFlags.FIN_REV))
    open_ = has(CtFlags.REPLY_SEEN) & ~has(CtFlags.SYN_ONLY)
    lasts = np.select(
        [tcp & closing, tcp & open_, tcp, icmp, has(CtFlags.REPLY_SEEN)],
        [_TCP_CLOSING_S, _TCP_ESTABLISHED_S, _TCP_SYN_S, _ICMP_S, _BOTH_WAYS_S],
        _ONE_WAY_S,
    )
    idle_s = (now_ns - rows["seen"].astype(np.int64)) / 1e9
    size = CtKey.LAYOUT.size
    over = np.flatnonzero(idle_s > lasts + GRACE_S).tolist()
    return [keys[at * size : (at + 1) * size] for at in over]


class Tracking:
    """`entries`: as of the last sweep, those removed not counted."""

    def __init__(self, table: Table[CtKey, CtEntry], clock: Clock) -> None:
        self._table = table
        self._clock = clock
        self.entries = 0
        self.removed = 0

    @property
    def fill(self) -> float:
        return self.entries / self._table.max_entries

    async def run(self) -> None:
        """Until cancelled."""
        pressed = False
        while True:
            await self.sweep()
            if self.fill > PRESSED and not pressed:
                log.warning("flows.pressed", rows=self.entries, reason="raise [agent] ct_max")
            pressed = self.fill > PRESSED
            await self._clock.sleep(PRESSED_PAUSE_S if pressed else SWEEP_PAUSE_S)

    async def sweep(self) -> None:
        entries = 0
        for keys, values, count in self._table.items_packed():
            gone = expired(keys, values, int(self._clock.monotonic_s() * 1e9))
            removed = self._table.delete_packed(b"".join(gone), len(gone)) if gone else 0
            entries += count - removed
            self.removed += removed
            await asyncio.sleep(0)
        self.entries = entries

    def observe(self) -> None:
        """Registers the metrics."""
        instruments = meter("tessera.agent")

        def gauge(name: str, what: str, read: Callable[[], float]) -> None:
            def call(_options: CallbackOptions) -> Iterable[Observation]:
                yield Observation(read())

            instruments.create_observable_gauge(name, [call], description=what)

        gauge("tessera_agent_flows", "Tracked flows at the last sweep", lambda: self.entries)
        gauge("tessera_agent_flows_fill", "Share of the flow table in use", lambda: self.fill)
        gauge("tessera_agent_flows_expired", "Flows swept since start", lambda: self.removed)
