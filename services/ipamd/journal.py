"""Into the store, what nodes have handed out of their windows while nobody else could have.

An entry is answered when the store has it, whoever wrote it: repeating is harmless. An address
outside of the node's windows (the node was taken for dead and its blocks given away, or a window
was narrowed meanwhile) is asked for like a static one; when another has it by now it is `lost`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ipam.allocate import Pick, Request
from ipam.block import address_text
from ipam.keys import Owner, address_key, block_key
from ipam.view import Assigned, View
from services.ipamd import rows, transactions
from services.ipamd.allocator import Allocator, found
from services.runtime.errors import Conflict, Invalid, NotFound, TesseraError
from services.runtime.log import logger
from services.store.commit import Committer
from services.store.model import NO_LEASE, Store, Txn, TxnResult

log = logger(__name__)

ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """`released`: the owner has given the addresses back. `at`: when, seconds since 1970."""

    owner: Owner
    pool: str
    addresses: tuple[int, ...]
    released: bool
    at: float


class Replayer:
    def __init__(
        self, store: Store, committer: Committer, view: View, allocator: Allocator
    ) -> None:
        self._store = store
        self._committer = committer
        self._view = view
        self._allocator = allocator

    async def replay(self, node: str, entries: Sequence[Entry]) -> list[str]:
        """Per entry what became of it: empty when the store has it, else why never. Raises
        `Retry`; then any number of them may have been written."""
        lost: list[str] = []
        for group in _independent(entries):
            lost += await self._group(node, group)
        return lost

    async def _group(self, node: str, group: Sequence[Entry]) -> list[str]:
        txns = [await self._txn(node, entry) for entry in group]
        sent = [txn for txn in txns if txn is not None]
        outcomes = iter(await self._committer.submit(sent, NO_LEASE))
        lost: list[str] = []
        for entry, txn in zip(group, txns, strict=True):
            outcome = next(outcomes) if txn is not None else None
            if isinstance(outcome, TesseraError):
                raise outcome
            if outcome is not None and outcome.succeeded:
                self._done(node, entry, outcome)
                lost.append("")
            elif entry.released:
                lost.append("" if txn is None else await self._again(node, entry))
            else:
                lost.append(await self._elsewhere(node, entry, outcome))
        return lost

    async def _txn(self, node: str, entry: Entry) -> Txn | None:
        """None: nothing to do (a release), or not a matter of windows (a take)."""
        if entry.released:
            held = await self._held(node, entry)
            if held and not self._picks(node, entry):
                await self._allocator.let_go(held, at_once=True)
                return None
            # In a window it is the node that lets an address rest.
            return transactions.release(held, None) if held else None
        picks = self._picks(node, entry)
        return (
            transactions.replay(Request(node, entry.owner, entry.pool), picks, entry.at)
            if picks
            else None
        )

    def _picks(self, node: str, entry: Entry) -> list[Pick]:
        picks: list[Pick] = []
        pool = self._view.pool(entry.pool)
        for address in entry.addresses:
            block = pool.block_of(address) if pool is not None else None
            claim = self._view.claim_of(entry.pool, block) if block is not None else None
            if claim is None or claim.node != node:
                return []
            if not claim.block.base <= address < claim.block.base + claim.window:
                return []
            picks.append(Pick(address, claim))
        return picks

    async def _held(self, node: str, entry: Entry) -> list[Assigned]:
        held: list[Assigned] = []
        for address in entry.addresses:
            row = self._view.holder(entry.pool, address)
            if row is None:
                kv = await self._store.get(address_key(entry.pool, address))
                row = None if kv is None else rows.assigned_of(kv)
            if row is not None and _is(row, node, entry.owner):
                held.append(row)
        return held

    def _done(self, node: str, entry: Entry, result: TxnResult) -> None:
        if entry.released:
            for address in entry.addresses:
                self._view.remove_address(entry.pool, address, result.revision)
            return
        for pick in self._picks(node, entry):
            block = pick.claim.block
            self._view.put_address(
                Assigned(entry.pool, pick.address, block, node, entry.owner, result.revision)
            )
        self._allocator.counts.replayed += 1

    async def _again(self, node: str, entry: Entry) -> str:
        """A release that lost: the rows have changed since they were seen."""
        for address in entry.addresses:
            kv = await self._store.get(address_key(entry.pool, address))
            if kv is not None and _is(row := rows.assigned_of(kv), node, entry.owner):
                await self._allocator.let_go([row], at_once=True)
        return ""

    async def _elsewhere(self, node: str, entry: Entry, outcome: TxnResult | None) -> str:
        """A take that lost, or whose addresses are not in the node's windows."""
        for _ in range(ATTEMPTS):
            if outcome is not None:
                self._learn(entry, outcome)
            held = [await self._stored(entry.pool, address) for address in entry.addresses]
            if all(row is not None and _is(row, node, entry.owner) for row in held):
                return ""
            await self._read_blocks(entry)
            picks = self._picks(node, entry)
            if not picks or any(held):
                break
            request = Request(node, entry.owner, entry.pool)
            outcome = await self._committer.one(transactions.replay(request, picks, entry.at))
            if outcome.succeeded:
                self._done(node, entry, outcome)
                return ""
        request = Request(node, entry.owner, entry.pool, entry.addresses)
        try:
            await self._allocator.allocate(request)
        except (Conflict, Invalid, NotFound) as error:
            texts = ", ".join(map(address_text, entry.addresses))
            log.warning("address.lost", address=texts, node=node, error=str(error))
            return str(error)
        return ""

    async def _read_blocks(self, entry: Entry) -> None:
        """The node may have been given the window by another replica, a moment ago."""
        pool = self._view.pool(entry.pool)
        for address in entry.addresses:
            block = pool.block_of(address) if pool is not None else None
            kv = await self._store.get(block_key(entry.pool, block)) if block else None
            if kv is not None:
                self._view.put_block(rows.claimed_of(kv))

    def _learn(self, entry: Entry, outcome: TxnResult) -> None:
        pool = self._view.pool(entry.pool)
        events = found(outcome)
        for address, block in zip(entry.addresses, events[1::2], strict=True):
            where = pool.block_of(address) if pool is not None else None
            if block is None and where is not None:
                self._view.remove_block(entry.pool, where, outcome.revision)
        for event in events:
            if event is not None:
                rows.apply(self._view, event)

    async def _stored(self, pool: str, address: int) -> Assigned | None:
        kv = await self._store.get(address_key(pool, address))
        return None if kv is None else rows.assigned_of(kv)


def _is(row: Assigned, node: str, owner: Owner) -> bool:
    same = (row.owner.namespace, row.owner.name, row.owner.interface) == (
        owner.namespace,
        owner.name,
        owner.interface,
    )
    return same and row.node == node and row.owner.uid == owner.uid and not row.retained_until


def _independent(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Runs in which no owner and no address is named twice: their order is of no account."""
    group: list[Entry] = []
    seen: set[object] = set()
    for entry in entries:
        owner = entry.owner
        keys = {(owner.namespace, owner.name, owner.interface), *entry.addresses}
        if not seen.isdisjoint(keys):
            yield group
            group, seen = [], set()
        group.append(entry)
        seen |= keys
    if group:
        yield group
