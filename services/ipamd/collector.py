"""Addresses whose owner is gone: found, shown, and released.

    a node reports what it has ──► what it does not know, twice in a row ──► released
    a node is not heard from   ──► for `node_gone_s` by this replica's count ──► forgotten
    kept for an owner          ──► until the time it was promised ──► released

Each release compares the revision under which the address was seen. Two reports in a row, because a
report may have been under way when the address was given: the second was made after the first was
answered, so it would know. Time counts only while the store answers and some other node is heard
from: a replica that is cut off, or comes back after an outage, collects nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ipam.block import address_text
from ipam.keys import Owner, node_key
from ipam.view import Assigned, View
from services.ipamd import rows, transactions
from services.ipamd.allocator import Allocator
from services.runtime.clock import Clock
from services.runtime.errors import Conflict, NotFound
from services.runtime.log import logger
from services.store.commit import Committer
from services.store.model import Compare, Delete, Revision, Store, Txn
from services.store.txn import absent, mod_is

log = logger(__name__)

EVERY_S = 10.0
# Younger than this, a node counts as alive when it is to be forgotten by hand.
ALIVE_S = 60.0
# What an owner has that has asked and not yet been answered.
ASKING: frozenset[int] = frozenset()

Who = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Leak:
    """`releases_in_s`: None when it does not by itself."""

    row: Assigned
    reason: str
    releases_in_s: float | None


@dataclass(slots=True)
class _Silence:
    revision: int
    seconds: float = 0.0


class Collector:
    """`gone_s`: a node silent for so long is taken for dead."""

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
        self._gone_s = gone_s
        self._suspects: dict[str, dict[tuple[str, int], int]] = {}
        self._reported: dict[str, frozenset[Who]] = {}
        self._silence: dict[str, _Silence] = {}
        self._last_s: float | None = None

    # -------------------------------------------------------------- reports

    async def report(self, node: str, held: Mapping[Who, frozenset[int]]) -> tuple[int, int]:
        """(suspected from now on, released now). An owner without addresses is asking just now."""
        before = self._suspects.get(node, {})
        known = frozenset().union(*held.values())
        unknown = [
            row
            for row in self._view.on_node(node)
            if not row.retained_until
            and row.address not in known
            and held.get(_who(row.owner)) != ASKING
        ]
        sure = [row for row in unknown if before.get((row.pool, row.address)) == row.revision]
        released = 0
        for group in _allocations(sure):
            if await self._allocator.let_go(group):
                released += len(group)
                self._collected(group, "its node does not know the owner")
        gone = {(row.pool, row.address) for row in sure}
        suspects = {
            key: row.revision for row in unknown if (key := (row.pool, row.address)) not in gone
        }
        self._suspects[node] = suspects
        self._reported[node] = frozenset(held)
        return len(suspects), released

    def in_use(self, row: Assigned) -> bool:
        """Its node said so in the last report that came here."""
        return _who(row.owner) in self._reported.get(row.node, frozenset())

    # -------------------------------------------------------------- time

    async def run(self) -> None:
        """Until cancelled. Raises `Retry` while the store is away."""
        self._last_s = None
        while True:
            await self.once()
            await self._clock.sleep(EVERY_S)

    async def once(self) -> None:
        # Counts nothing, and does nothing, unless the store answers.
        await self._store.get(node_key(""))
        now_s = self._clock.monotonic_s()
        passed_s = 0.0 if self._last_s is None else min(now_s - self._last_s, 2 * EVERY_S)
        self._last_s = now_s
        self._count(passed_s)
        for node in self.dead():
            addresses, blocks = await self.forget(node)
            log.warning("node.gone", node=node, count=addresses, blocks=blocks)
        await self._end_keeping()

    def _count(self, passed_s: float) -> None:
        nodes = self._view.nodes()
        names = {*nodes, *(row.node for row in self._view.assigned() if not row.retained_until)}
        names |= {claim.node for claim in self._view.blocks()}
        counted: dict[str, _Silence] = {}
        for name in names:
            revision = nodes[name].revision if name in nodes else 0
            known = self._silence.get(name)
            if known is None or known.revision != revision:
                counted[name] = _Silence(revision)
            else:
                counted[name] = _Silence(revision, known.seconds + passed_s)
        self._silence = counted

    def dead(self) -> list[str]:
        """Nodes not heard from for too long, as long as somebody else was heard from meanwhile."""
        heard = [s.seconds for name, s in self._silence.items() if name in self._view.nodes()]
        if not heard or min(heard) >= self._gone_s / 2:
            return []
        return sorted(n for n, s in self._silence.items() if s.seconds >= self._gone_s)

    async def _end_keeping(self) -> None:
        now_s = self._clock.now_s()
        over = [row for row in self._view.retained() if row.retained_until <= now_s]
        for group in _allocations(over):
            if await self._allocator.let_go(group, at_once=True):
                self._collected(group, "its owner did not come back in time")

    # -------------------------------------------------------------- nodes

    async def forget(self, node: str) -> tuple[int, int]:
        """Releases what a node has; (addresses, blocks). Ends when the node is heard from again."""
        known = self._view.nodes().get(node)
        if known is not None:
            compare = mod_is(node_key(node), Revision(known.revision))
            result = await self._store.txn(Txn((compare,), (Delete(node_key(node)),)))
            if not result.succeeded:
                return 0, 0
            self._view.remove_node(node, result.revision)
        guards = (absent(node_key(node)),)
        mine = [row for row in self._view.on_node(node) if not row.retained_until]
        released = 0
        for group in _allocations(mine):
            if await self._release(group, guards):
                released += len(group)
                self._collected(group, "its node is gone")
        return released, await self._give_back(node, guards)

    async def forget_by_hand(self, node: str, *, force: bool) -> tuple[int, int]:
        """Raises `NotFound`, and `Conflict` for a node that was heard from a moment ago."""
        known = self._view.nodes().get(node)
        blocks = any(claim.node == node for claim in self._view.blocks())
        if known is None and not blocks and not self._view.on_node(node):
            raise NotFound(f"no node {node!r} has addresses or blocks")
        silence = self._silence.get(node)
        age_s = self._clock.now_s() - known.record.heard_at if known is not None else ALIVE_S
        if age_s < ALIVE_S and not force and (silence is None or silence.seconds < ALIVE_S):
            raise Conflict(
                f"node {node} was heard from {age_s:.0f} s ago: stop its agent first, or its"
                " endpoints keep addresses that others are given"
            )
        return await self.forget(node)

    async def _release(self, group: Sequence[Assigned], guards: Sequence[Compare]) -> bool:
        if group[0].retain_s:
            return await self._allocator.let_go(group)
        result = await self._committer.one(transactions.release(group, None, guards))
        for row in group if result.succeeded else ():
            self._view.remove_address(row.pool, row.address, result.revision)
        return result.succeeded

    async def _give_back(self, node: str, guards: Sequence[Compare]) -> int:
        """A block with others' addresses in it stays, without its window."""
        given = 0
        for claim in [c for c in self._view.blocks() if c.node == node]:
            result = await self._committer.one(transactions.give_back(claim, guards))
            if result.succeeded:
                self._view.remove_block(claim.pool, claim.block, result.revision)
                given += 1
            elif claim.window:
                txn = transactions.narrow(claim, 0, guards)
                result = await self._committer.one(txn)
                for event in rows.written(txn, result.revision) if result.succeeded else ():
                    rows.apply(self._view, event)
        return given

    # -------------------------------------------------------------- what is shown

    def leaks(self) -> list[Leak]:
        found: list[Leak] = []
        for row in self._view.assigned():
            leak = self._leak(row)
            if leak is not None:
                found.append(leak)
        return sorted(found, key=lambda leak: (leak.row.pool, leak.row.address))

    def _leak(self, row: Assigned) -> Leak | None:
        if row.retained_until:
            return None
        if (row.pool, row.address) in self._suspects.get(row.node, {}):
            return Leak(row, f"node {row.node} does not know the owner", EVERY_S)
        silence = self._silence.get(row.node)
        if silence is None or silence.seconds < ALIVE_S:
            return None
        left = max(self._gone_s - silence.seconds, 0.0)
        if row.node in self._view.nodes():
            return Leak(row, f"node {row.node} is silent for {silence.seconds:.0f} s", left)
        return Leak(row, f"no node {row.node} is known", left)

    def _collected(self, group: Sequence[Assigned], reason: str) -> None:
        self._allocator.counts.collected += len(group)
        for row in group:
            log.info(
                "address.collected",
                address=address_text(row.address),
                node=row.node,
                name=str(row.owner),
                reason=reason,
            )


def _who(owner: Owner) -> Who:
    return owner.namespace, owner.name, owner.interface


def _allocations(found: Iterable[Assigned]) -> list[list[Assigned]]:
    """Rows of one transaction together, so that an owner loses all of them or none."""
    groups: defaultdict[tuple[Who, int], list[Assigned]] = defaultdict(list)
    for row in found:
        groups[_who(row.owner), row.revision].append(row)
    return list(groups.values())
