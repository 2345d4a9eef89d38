"""Keeps the view at the store's heels."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from ipam.view import View
from services.ipamd import rows
from services.runtime import garbage
from services.runtime.log import logger
from services.store.model import Revision, Store, Synced

log = logger(__name__)


class Follower:
    """`synced` is set once the view holds all that was stored at the start."""

    def __init__(self, store: Store, view: View) -> None:
        self._store = store
        self._view = view
        self.synced = asyncio.Event()

    async def run(self) -> None:
        """Returns when the store is closed."""
        with ExitStack() as reading:
            reading.enter_context(garbage.building())
            async for batch in self._store.watch(*rows.WATCHED):
                for event in batch:
                    if isinstance(event, Synced):
                        reading.close()
                        self._synced(event.revision)
                    else:
                        rows.apply(self._view, event)

    def _synced(self, revision: Revision) -> None:
        self.synced.set()
        count = sum(1 for _ in self._view.assigned())
        log.info("ipam.synced", revision=revision, count=count)
