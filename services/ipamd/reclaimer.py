"""Gives back blocks that stood empty. Every replica may try; the transaction lets one succeed."""

from __future__ import annotations

from ipam.reclaim import EMPTY_FOR_S, Since, decide
from ipam.view import View
from services.ipamd import transactions
from services.runtime.clock import Clock
from services.runtime.log import logger
from services.store.model import Store

log = logger(__name__)

EVERY_S = 5.0


class Reclaimer:
    def __init__(
        self, store: Store, view: View, clock: Clock, after_s: float = EMPTY_FOR_S
    ) -> None:
        self._store = store
        self._view = view
        self._clock = clock
        self._after_s = after_s
        self._empty_since: Since = {}

    async def run(self) -> None:
        while True:
            await self.once()
            await self._clock.sleep(EVERY_S)

    async def once(self) -> int:
        """How many blocks were given back."""
        decision = decide(self._view, self._empty_since, self._clock.monotonic_s(), self._after_s)
        self._empty_since = decision.empty_since
        given_back = 0
        for claimed in decision.give_back:
            result = await self._store.txn(transactions.give_back(claimed))
            if result.succeeded:
                self._view.remove_block(claimed.pool, claimed.block, result.revision)
                log.info(
                    "block.given_back",
                    block=str(claimed.block),
                    pool=claimed.pool,
                    node=claimed.node,
                )
            given_back += result.succeeded
        return given_back
