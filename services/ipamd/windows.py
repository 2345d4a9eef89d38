"""Windows: the first half of a node's block, which the node hands out by itself.

    node: held, narrowed as it likes ──► sync ──► store: narrow what is larger there
          wanted pools                       └──► store: claim fresh blocks with a window
          ◄── given (read from the store)    ◄── gone, confirmed, recalled

Two rules keep an address from being handed out by both sides. A window only shrinks, and it is the
node that says so, after it has stopped: what it gives up becomes the service's with the store's
write. And a window that the node does not name is answered from the store, never from the view,
together with what is in use in it: so a node that lost its disk, or an answer, begins right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ipam.allocate import sparse
from ipam.block import Block, Family
from ipam.keys import NodeRecord, block_key
from ipam.pool import Pool
from ipam.ranges import size, within
from ipam.view import Assigned, Claimed, View
from services.ipamd import rows, transactions
from services.ipamd.allocator import Allocator
from services.runtime.clock import Clock
from services.runtime.log import logger
from services.store.commit import Committer
from services.store.model import RangeResult, Revision, Store

log = logger(__name__)

# More than a node uses up between two calls; the rest of a large IPv6 block is the service's.
MAX_WINDOW = 1 << 16
# Below this many free addresses a pool calls windows back.
SHORT_OF = 8
# A node that calls is noted so often, and in any case several times before it counts as gone.
HEARD_EVERY_S = 20.0
ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Window:
    pool: str
    block: Block
    generation: int
    size: int


@dataclass(frozen=True, slots=True)
class Given:
    window: Window
    taken: tuple[Assigned, ...]
    cooling: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Synced:
    given: tuple[Given, ...]
    gone: tuple[Window, ...]
    confirmed: tuple[Window, ...]
    recalled: tuple[Window, ...]


class Windows:
    def __init__(
        self,
        store: Store,
        committer: Committer,
        view: View,
        allocator: Allocator,
        clock: Clock,
        gone_s: float,
    ) -> None:
        self._store = store
        self._committer = committer
        self._view = view
        self._allocator = allocator
        self._clock = clock
        self._heard_every_s = min(HEARD_EVERY_S, gone_s / 6)

    async def heard(self, node: str, instance: str, networks: tuple[str, ...]) -> None:
        """A node that lives, noted in the store every so often."""
        now_s = self._clock.now_s()
        known = self._view.nodes().get(node)
        if (
            known is not None
            and (known.record.instance, known.record.networks) == (instance, networks)
            and 0 <= now_s - known.record.heard_at < self._heard_every_s
        ):
            return
        record = NodeRecord(instance, now_s, networks)
        put = transactions.heard(node, record)
        revision = await self._store.put(put.key, put.value)
        self._view.put_node(node, record, revision)

    async def sync(
        self, node: str, held: Sequence[Window], wanted: Sequence[tuple[str, Family]]
    ) -> Synced:
        gone: list[Window] = []
        confirmed: list[Window] = []
        for window in held:
            now = await self._settle(node, window)
            if now is None:
                gone.append(window)
            elif now.window == window.size:
                confirmed.append(window)
        known = {(window.pool, window.block) for window in held}
        for pool, family in wanted:
            await self._claim(node, pool, family)
        given = [
            fresh
            for pool in self._view.pools()
            for claim in tuple(self._view.blocks_of(pool.name, node))
            if claim.window and (pool.name, claim.block) not in known
            if (fresh := await self._read(node, claim)) is not None
        ]
        recalled = [w for w in held if w.size and self._unwanted(w)]
        return Synced(tuple(given), tuple(gone), tuple(confirmed), tuple(recalled))

    # -------------------------------------------------------------- steps

    async def _settle(self, node: str, window: Window) -> Claimed | None:
        """The block as the store has it by now, never larger than the node says; None: it is not
        this node's, or not under this claim."""
        claim = self._view.claim_of(window.pool, window.block)
        if claim is None or claim.created != window.generation or claim.node != node:
            claim = await self._stored(window.pool, window.block)
            if claim is None or claim.created != window.generation or claim.node != node:
                return None
        if claim.window <= window.size:
            return claim
        txn = transactions.narrow(claim, window.size)
        result = await self._committer.one(txn)
        if not result.succeeded:
            return claim
        (written,) = rows.written(txn, result.revision)
        now = rows.claimed_of(replace(written.kv, create_revision=Revision(claim.created)))
        self._view.put_block(now)
        log.info("window.narrowed", block=str(window.block), node=node, count=window.size)
        return now

    async def _claim(self, node: str, name: str, family: Family) -> None:
        pool = self._view.pool(name)
        if pool is None or not pool.local or self._short(pool, family):
            return
        held = sum(1 for c in self._view.blocks_of(name, node) if c.block.family is family)
        if 0 < pool.max_blocks <= held:
            return
        for _ in range(ATTEMPTS):
            block = self._view.unclaimed(name, family, sparse(node))
            if block is None:
                return
            size = min(block.count // 2, MAX_WINDOW)
            if await self._allocator.claim(name, block, node, size) is not None:
                return

    async def _read(self, node: str, claim: Claimed) -> Given | None:
        result = await self._store.txn(transactions.read_block(claim.pool, claim.block))
        held, addresses, cooling = (
            each.items for each in result.results if isinstance(each, RangeResult)
        )
        if not held:
            return None
        now = rows.claimed_of(held[0])
        if now.node != node or not now.window:
            return None
        end = now.block.base + now.window
        taken = [rows.assigned_of(kv) for kv in addresses]
        return Given(
            Window(now.pool, now.block, now.created, now.window),
            tuple(row for row in taken if row.address < end),
            tuple(a for kv in cooling if (a := rows.cooling_of(kv)) < end),
        )

    async def _stored(self, pool: str, block: Block) -> Claimed | None:
        kv = await self._store.get(block_key(pool, block))
        return None if kv is None else rows.claimed_of(kv)

    def _unwanted(self, window: Window) -> bool:
        pool = self._view.pool(window.pool)
        if pool is None or not pool.local or not pool.owns(window.block):
            return True
        block = window.block
        lost = size(within(pool.lost, block.base, block.base + window.size - 1))
        return lost == window.size or self._closing(pool, window) or self._short(pool, block.family)

    def _closing(self, pool: Pool, window: Window) -> bool:
        """A part of the block is disabled: an operator may be about to take it away."""
        return any(
            network.version == window.block.family
            and int(network.network_address) <= window.block.last
            and int(network.broadcast_address) >= window.block.base
            for network in pool.disabled
        )

    def _short(self, pool: Pool, family: Family) -> bool:
        """Nothing is left to claim, and next to nothing to lend."""
        if self._view.unclaimed(pool.name, family, 0) is not None:
            return False
        left = 0
        for claim in self._view.blocks_of(pool.name):
            if claim.block.family is family:
                left += self._view.room(claim)
                if left >= SHORT_OF:
                    return False
        return True
