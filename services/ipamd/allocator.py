"""Addresses to owners: decide from the view, commit in one transaction, learn from a lost one.

    request ─► decide ─► Take  ─► txn ─ won ─► Assigned
                 ▲  │              └─ lost ─► what stood in the way goes into the view ─┐
                 │  └► Claim ─► txn (one under way per node, pool and family) ──────────┤
                 └──────────────────────────────────────────────────────────────────────┘

Nothing here is remembered beyond the view: any number of replicas may run, and a call that ended
with an unknown outcome may be repeated, because the owner's key answers it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from ipam.allocate import (
    Claim,
    Full,
    Held,
    Pick,
    Refused,
    Request,
    Resume,
    Take,
    Why,
    decide,
)
from ipam.block import Block, Family, address_text
from ipam.keys import BlockRecord, Owner, owner_key
from ipam.view import Assigned, Claimed, View
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
from services.store.commit import Committer
from services.store.model import NO_LEASE, Changed, RangeResult, Store, TxnResult

log = logger(__name__)

# Each attempt teaches the view at least one thing; only a crowd of replicas needs more than two.
ATTEMPTS = 50

_SPREAD_BITS = 12  # as many as the largest IPv4 block has addresses

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
    kept: int = 0
    borrowed: int = 0
    claimed: int = 0
    replayed: int = 0
    collected: int = 0
    lost: int = 0
    exhausted: int = 0


class Allocator:
    """The view must have been read once before the first call."""

    def __init__(
        self,
        store: Store,
        committer: Committer,
        view: View,
        clock: Clock,
        random: Random,
        cooldown: CoolDown,
    ) -> None:
        self._store = store
        self._committer = committer
        self._view = view
        self._clock = clock
        self._random = random
        self._cooldown = cooldown
        self._claims: dict[tuple[str, str, Family], asyncio.Event] = {}
        self.counts = Counts()

    async def allocate(self, request: Request) -> tuple[Assigned, ...]:
        """Of every family of the pool, IPv4 first. Idempotent per owner. Raises `Exhausted`,
        `Conflict` (the owner or a wanted address is held otherwise), `Invalid`, `NotFound` (pool),
        `Retry`."""
        held: Sequence[Assigned] = ()
        for attempt in range(ATTEMPTS):
            # The view may be late; what an owner holds is answered by the store.
            if attempt or self._view.held_by(request.owner):
                held = await self._stored(request.owner)
            decision = decide(self._view, request, held, self._random.getrandbits(_SPREAD_BITS))
            match decision:
                case Held(assigned):
                    return assigned
                case Take() | Resume():
                    taken = await self._take(request, decision)
                    if taken is not None:
                        return taken
                case Claim(block):
                    await self._claim(request, block)
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
        held = [row for row in self._view.held_by(owner) if _same(row, owner, node)]
        newest = max((row.revision for row in held), default=0)
        held = [row for row in held if row.revision == newest]
        for _ in range(ATTEMPTS):
            held = held or [r for r in await self._stored(owner) if _same(r, owner, node)]
            if not held:
                return False
            if await self.let_go(held):
                return True
            held = []
        raise Retry(f"{owner}: {ATTEMPTS} transactions lost while releasing; try again")

    async def let_go(self, held: Sequence[Assigned], *, at_once: bool = False) -> bool:
        """Releases the rows of one allocation as they were last seen, or keeps them for their owner
        if that was asked for; `at_once`: released in any case. False: they have changed since."""
        if held[0].retain_s and not at_once:
            return await self._keep(held)
        lease = await self._cooldown.lease(self._cooldown_s(held[0].pool))
        txn = transactions.release(held, lease)
        try:
            result = await self._committer.one(txn, lease or NO_LEASE)
        except NotFound:
            self._cooldown.forget(lease)
            return False
        if result.succeeded:
            for row in held:
                self._view.remove_address(row.pool, row.address, result.revision)
                if lease is not None:
                    self._view.put_cooling(row.pool, row.address, row.block)
            self.counts.released += 1
            log.debug("address.released", address=_texts(held), name=str(held[0].owner))
        return result.succeeded

    async def claim(self, pool: str, block: Block, node: str, window: int = 0) -> Claimed | None:
        """None: lost against another."""
        record = BlockRecord(node, self._clock.now_s(), window)
        self._view.hold_block(pool, block)
        try:
            revision = self._view.pool_revision(pool)
            txn = transactions.claim(pool, revision, block, record)
            result = await self._committer.one(txn)
            if not result.succeeded:
                self._learn_claim(pool, result)
                return None
            for event in rows.written(txn, result.revision):
                rows.apply(self._view, event)
        finally:
            self._view.drop_block(pool, block)
        self.counts.claimed += 1
        log.info("block.claimed", block=str(block), pool=pool, node=node)
        return self._view.claim_of(pool, block)

    # -------------------------------------------------------------- steps

    async def _stored(self, owner: Owner) -> tuple[Assigned, ...]:
        """As the store has it; the view learns it too."""
        kv = await self._store.get(owner_key(owner))
        if kv is None:
            return ()
        held = rows.owned_of(owner, kv)
        for row in held:
            self._view.put_address(row)
        return held

    async def _take(self, request: Request, decision: Take | Resume) -> tuple[Assigned, ...] | None:
        now_s = self._clock.now_s()
        if isinstance(decision, Resume):
            result = await self._committer.one(transactions.resume(request, decision.kept, now_s))
            if not result.succeeded:
                self.counts.lost += 1
                return None
            places = [(row.address, row.block) for row in decision.kept]
        else:
            taken = await self._commit_take(request, decision.picks, now_s)
            if taken is None:
                return None
            result = taken
            places = [(pick.address, pick.claim.block) for pick in decision.picks]
            self.counts.borrowed += sum(p.claim.node != request.node for p in decision.picks)
        assigned = tuple(
            Assigned(
                request.pool,
                address,
                block,
                request.node,
                request.owner,
                result.revision,
                request.retain_s,
            )
            for address, block in places
        )
        for row in assigned:
            self._view.put_address(row)
        self.counts.allocated += 1
        log.debug(
            "address.allocated", address=_texts(assigned), pool=request.pool, node=request.node
        )
        return assigned

    async def _commit_take(
        self, request: Request, picks: Sequence[Pick], now_s: float
    ) -> TxnResult | None:
        for pick in picks:
            self._view.hold(request.pool, pick.claim.block, pick.address)
        try:
            result = await self._committer.one(transactions.take(request, picks, now_s))
        finally:
            for pick in picks:
                self._view.drop(request.pool, pick.claim.block, pick.address)
        if result.succeeded:
            return result
        self._learn_take(request, picks, result)
        return None

    def _learn_take(self, request: Request, picks: Sequence[Pick], result: TxnResult) -> None:
        self.counts.lost += 1
        own, *seen = found(result)
        if own is not None:
            for row in rows.owned_of(request.owner, own.kv):
                self._view.put_address(row)
        for pick, block in zip(picks, seen[2::3], strict=True):
            if block is None:
                self._view.remove_block(request.pool, pick.claim.block, result.revision)
        for event in seen:
            if event is not None:
                rows.apply(self._view, event)

    async def _claim(self, request: Request, block: Block) -> None:
        key = (request.pool, request.node, block.family)
        under_way = self._claims.get(key)
        if under_way is not None:
            await under_way.wait()
            return
        self._claims[key] = done = asyncio.Event()
        try:
            await self.claim(request.pool, block, request.node)
        finally:
            del self._claims[key]
            done.set()

    def _learn_claim(self, pool: str, result: TxnResult) -> None:
        self.counts.lost += 1
        held, definition = found(result)
        if held is not None:
            rows.apply(self._view, held)
        if definition is not None:
            rows.apply(self._view, definition)
        else:
            self._view.remove_pool(pool, result.revision)

    async def _await_claim_or_refuse(self, full: Full) -> None:
        """A block that is just being claimed may have room for this request too."""
        under_way = [e for (pool, _, _), e in self._claims.items() if pool == full.pool.name]
        if under_way:
            await under_way[0].wait()
            return
        self.counts.exhausted += 1
        if full.in_windows and not full.limited:
            raise Retry(
                f"{full}; the nodes are asked to give those back: try again in some seconds"
            )
        raise Exhausted(str(full))

    async def _keep(self, held: Sequence[Assigned]) -> bool:
        until_s = self._clock.now_s() + held[0].retain_s
        result = await self._committer.one(transactions.keep(held, until_s))
        if result.succeeded:
            for row in held:
                kept = replace(row, revision=result.revision, retained_until=until_s)
                self._view.put_address(kept)
            self.counts.kept += 1
        return result.succeeded

    def _cooldown_s(self, pool: str) -> int | None:
        known = self._view.pool(pool)
        return known.cooldown_s if known else None


def _same(held: Assigned, owner: Owner, node: str) -> bool:
    """A late release, of an earlier incarnation or from another node, must not hit the present."""
    return (
        (not node or held.node == node)
        and (not owner.uid or not held.owner.uid or owner.uid == held.owner.uid)
        and not held.retained_until
    )


def found(result: TxnResult) -> list[Changed | None]:
    """The key that each Range of the branch taken was for."""
    return [
        Changed(each.items[0]) if isinstance(each, RangeResult) and each.items else None
        for each in result.results
    ]


def _texts(held: Sequence[Assigned]) -> str:
    return ",".join(address_text(row.address) for row in held)
