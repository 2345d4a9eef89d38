"""When checkpoints are written: the endpoints at once, the view some time after it changed.

Writing happens in a thread; changes that arrive meanwhile are in the next write, so a burst of
endpoints shares two writes, and `save` returns only when what was there at its call is on disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from datapath.agent import checkpoint
from datapath.agent.checkpoint import ENDPOINTS_FILE, VIEW_FILE, Journal
from datapath.agent.view import View
from services.runtime.clock import Clock
from services.runtime.errors import Exhausted
from services.runtime.log import logger

log = logger(__name__)

# What the time of the view's file lags behind at most.
TOUCH_S = 15.0
# The view can be large and changes often; what a restart lacks, the tables tell.
VIEW_PAUSE_S = 2.0


class Keeper:
    def __init__(
        self,
        folder: Path,
        journal: Callable[[], Journal],
        view: View,
        clock: Clock,
        heard_s: Callable[[], float],
    ) -> None:
        """`heard_s`: wall time until which the view is known to be the newest."""
        self._heard_s = heard_s
        self._folder = folder
        self._journal = journal
        self._view = view
        self._clock = clock
        self._writing = asyncio.Lock()
        self._asked = 0
        self._saved = 0
        self._view_changed = asyncio.Event()

    async def save(self) -> None:
        """The journal, as it is now or later."""
        self._asked += 1
        mine = self._asked
        async with self._writing:
            if self._saved >= mine:
                return
            covers, packed = self._asked, checkpoint.pack_journal(self._journal())
            await asyncio.to_thread(checkpoint.write, self._folder / ENDPOINTS_FILE, packed)
            self._saved = covers

    def view_changed(self) -> None:
        self._view_changed.set()

    async def run(self) -> None:
        """Until cancelled; then the view is written once more."""
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(TOUCH_S):
                        await self._view_changed.wait()
                if self._view_changed.is_set():
                    await self._clock.sleep(VIEW_PAUSE_S)
                    self._view_changed.clear()
                    packed = checkpoint.pack_view(self._view)
                    await asyncio.to_thread(self._write_view, packed)
                checkpoint.still_newest(self._folder, self._heard_s())
        finally:
            self._write_view(checkpoint.pack_view(self._view))
            checkpoint.still_newest(self._folder, self._heard_s())

    def _write_view(self, packed: bytes) -> None:
        try:
            checkpoint.write(self._folder / VIEW_FILE, packed)
        except Exhausted as error:
            # A full disk is no reason to stop judging; the next change tries again.
            log.warning("checkpoint.unwritten", error=str(error))
