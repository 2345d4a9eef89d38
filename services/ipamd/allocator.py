"""Addresses to owners: decide from the view, commit in one transaction, learn from a lost one.

    request ─► decide ─► Take  ─► txn ─ won ─► Assigned
                 ▲  │              └─ lost ─► what stood in the way goes into the view ─┐
                 │  └► Claim ─► txn (one under way per node and pool) ──────────────────┤
                 └─────────────────────────────────────────────────────────────────────┘

Nothing here is remembered beyond the view: any number of replicas may run, and a call that ended
with an unknown outcome may be repeated, because the owner's key answers it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random

from ipam.allocate import Claim, Full, Held, Refused, Request, Take, Why, decide
from ipam.keys import Owner, owner_key
from ipam.pool import address_text
from ipam.view import Assigned, View
from services.ipamd import rows, transactions
from services.ipamd.cooldown import CoolDown
from services.runtime.clock import Clock
from services.runtime.errors import (
    Conflict,
    Exhausted,
    Invalid,
    NotFound,
    Retry,
    TesseraError,
)
from services.runtime.log import logger
from services.store.model import Changed, RangeResult, Store, TxnResult

log = logger(__name__)

# Each attempt teaches the view at least one thing; only a crowd of replicas needs more than two.
ATTEMPTS = 50

_SPREAD_BITS = 12  # as many as the largest block has addresses

_ERRORS: dict[Why, type[TesseraError]] = {
    Why.UNKNOWN_POOL: NotFound,
    Why.NOT_USABLE: Invalid,
    Why.TAKEN: Conflict,
    Why.COOLING: Retry,
}


@dataclass(slots=True)
class Counts:
    allocated: int = 0
    released: int = 0
    borrowed: int = 0
    claimed: int = 0
    lost: int = 0
    exhausted: int = 0


class Allocator:
    """The view must have been read once before the first call."""

    def __init__(
        self, store: Store, view: View, clock: Clock, random: Random, cooldown: CoolDown
    ) -> None:
        self._store = store
        self._view = view
        self._clock = clock
        self._random = random
        self._cooldown = cooldown
        self._claims: dict[tuple[str, str], asyncio.Event] = {}
        self.counts = Counts()

    async def allocate(self, request: Request) -> Assigned:
        """Idempotent per owner. Raises `Exhausted`, `Conflict` (the owner or the wanted address is
        held otherwise), `Invalid`, `NotFound` (pool), `Retry`."""
        for _ in range(ATTEMPTS):
            if self._view.held_by(request.owner) is not None:
                await self._confirm(request.owner)
            decision = decide(self._view, request, self._random.getrandbits(_SPREAD_BITS))
            match decision:
                case Held(assigned):
                    return assigned
                case Take():
                    taken = await self._take(request, decision)
                    if taken is not None:
                        return taken
                case Claim():
                    await self._claim(request, decision)
                case Full():
                    await self._await_claim_or_refuse(decision)
                case Refused():
                    raise _ERRORS[decision.why](decision.message)
        raise Retry(
            f"{request.owner}: {ATTEMPTS} transactions lost against others in pool {request.pool};"
            " try again"
        )

    async def release(self, owner: Owner, node: str) -> bool:
        """False when the owner, or this incarnation of it on this node, has no address."""
        known = self._view.held_by(owner)
        for _ in range(ATTEMPTS):
            held = known or await self._stored(owner)
            if held is None or not _same(held, owner, node):
                if known is None:
                    return False
            elif await self._release(held):
                self.counts.released += 1
                log.debug(
                    "address.released",
                    address=address_text(held.address),
                    node=node,
                    name=str(owner),
                )
                return True
            known = None
        raise Retry(f"{owner}: {ATTEMPTS} transactions lost while releasing; try again")

    # -------------------------------------------------------------- steps

    async def _confirm(self, owner: Owner) -> None:
        """The view may be late; what an owner holds is answered by the store."""
        known, stored = self._view.held_by(owner), await self._stored(owner)
        if known is not None and (stored is None or stored.revision != known.revision):
            self._view.remove_address(known.pool, known.address, known.revision)
        if stored is not None:
            self._view.put_address(stored)

    async def _stored(self, owner: Owner) -> Assigned | None:
        kv = await self._store.get(owner_key(owner))
        return None if kv is None else rows.owned_of(owner, kv)

    async def _take(self, request: Request, decision: Take) -> Assigned | None:
        pool, block, address = request.pool, decision.claim.block, decision.address
        self._view.hold(pool, block, address)
        try:
            result = await self._store.txn(
                transactions.take(request, decision, self._clock.now_s())
            )
            if not result.succeeded:
                self._learn_take(request, decision, result)
                return None
            taken = Assigned(pool, address, block, request.node, request.owner, result.revision)
            self._view.put_address(taken)
        finally:
            self._view.drop(pool, block, address)
        self.counts.allocated += 1
        self.counts.borrowed += decision.claim.node != request.node
        log.debug("address.allocated", address=address_text(address), pool=pool, node=request.node)
        return taken

    def _learn_take(self, request: Request, decision: Take, result: TxnResult) -> None:
        self.counts.lost += 1
        own, address, held, cooling = _found(result)
        if own is not None:
            self._view.put_address(rows.owned_of(request.owner, own.kv))
        for event in (address, held, cooling):
            if event is not None:
                rows.apply(self._view, event)
        if held is None:
            self._view.remove_block(request.pool, decision.claim.block, result.revision)

    async def _claim(self, request: Request, decision: Claim) -> None:
        under_way = self._claims.get((request.pool, request.node))
        if under_way is not None:
            await under_way.wait()
            return
        self._claims[request.pool, request.node] = done = asyncio.Event()
        self._view.hold_block(request.pool, decision.block)
        try:
            await self._commit_claim(request, decision)
        finally:
            self._view.drop_block(request.pool, decision.block)
            del self._claims[request.pool, request.node]
            done.set()

    async def _commit_claim(self, request: Request, decision: Claim) -> None:
        pool, block = request.pool, decision.block
        revision = self._view.pool_revision(pool)
        txn = transactions.claim(pool, revision, decision, request.node, self._clock.now_s())
        result = await self._store.txn(txn)
        if result.succeeded:
            for event in rows.written(txn, result.revision):
                rows.apply(self._view, event)
            self.counts.claimed += 1
            log.info("block.claimed", block=str(block), pool=pool, node=request.node)
            return
        self.counts.lost += 1
        held, definition = _found(result)
        if held is not None:
            rows.apply(self._view, held)
        if definition is not None:
            rows.apply(self._view, definition)
        else:
            self._view.remove_pool(pool, result.revision)

    async def _await_claim_or_refuse(self, full: Full) -> None:
        """A block that is just being claimed may have room for this request too."""
        under_way = [e for (pool, _), e in self._claims.items() if pool == full.pool.name]
        if not under_way:
            self.counts.exhausted += 1
            raise Exhausted(str(full))
        await under_way[0].wait()

    async def _release(self, held: Assigned) -> bool:
        lease = await self._cooldown.lease()
        try:
            result = await self._store.txn(transactions.release(held, lease))
        except NotFound:
            self._cooldown.forget(lease)
            return False
        if result.succeeded:
            self._view.remove_address(held.pool, held.address, result.revision)
            if lease is not None:
                self._view.put_cooling(held.pool, held.address, held.block)
        return result.succeeded


def _same(held: Assigned, owner: Owner, node: str) -> bool:
    """A late release, of an earlier incarnation or from another node, must not hit the present."""
    return (not node or held.node == node) and (
        not owner.uid or not held.owner.uid or owner.uid == held.owner.uid
    )


def _found(result: TxnResult) -> list[Changed | None]:
    """The key that each Range of the branch taken was for."""
    return [
        Changed(each.items[0]) if isinstance(each, RangeResult) and each.items else None
        for each in result.results
    ]
