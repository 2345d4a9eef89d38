"""Pools in the store: the configured ones, written at start, and what operators change.

A change is refused before anything is written when it would overlap another pool, a node's network
or another cluster, or lose an address in use; the transaction then compares everything that the
judgement was made from. A pool that only the store has is kept at start: another replica's
configuration may be newer, or an operator made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ipam.block import Block, address_text
from ipam.keys import (
    ADDRESSES,
    BLOCKS,
    POOLS,
    PoolRecord,
    defined,
    parse_address_key,
    parse_pool_key,
)
from ipam.pool import Pool, PoolError, overlap
from ipam.ranges import Ranges
from ipam.view import Claimed
from services.ipamd import foreign, rows, transactions
from services.runtime.errors import Conflict, Invalid, NotFound
from services.runtime.log import logger
from services.store.model import KeyValue, Listing, Store

log = logger(__name__)

ATTEMPTS = 5
SHOWN = 3
# An operator wants to see them; the list ends somewhere.
LISTED = 50

Old = Pool | None


async def ensure(store: Store, configured: Mapping[str, PoolRecord]) -> None:
    """Raises `Invalid` with what is wrong, `Conflict` when others keep changing the pools."""
    wanted = []
    for name, record in configured.items():
        try:
            wanted.append(define(name, record))
        except Invalid as error:
            raise Invalid(f"[ipamd.pools.{name}]: {error}") from None
    for pool in wanted:
        await _write(store, pool, wanted, lambda _pool, _revision: None, shown=SHOWN)


async def put(
    store: Store, name: str, record: PoolRecord, revision: int | None, *, dry_run: bool = False
) -> tuple[Pool, str, int]:
    """(the pool, what was done, its revision). `revision`: what the pool must have; 0: it must not
    exist; None: any. Raises `Invalid`, `Conflict`."""
    pool = define(name, record)

    def unchanged(old: Old, stored: int) -> None:
        if revision is None or revision == stored:
            return
        if old is None:
            raise NotFound(f"no pool {name!r} to change")
        if revision == 0:
            raise Conflict(f"pool {name} exists already; change it with update")
        raise Conflict(f"pool {name} was changed meanwhile (revision {stored}); read it again")

    return await _write(store, pool, [pool], unchanged, shown=LISTED, dry_run=dry_run)


async def delete(store: Store, name: str, revision: int | None) -> int:
    """How many blocks went with it. Raises `NotFound`, `Conflict`, `Invalid` while addresses are in
    use, or nodes keep windows."""
    for _ in range(ATTEMPTS):
        listing = await store.list(POOLS)
        old, stored = _find(listing, name)
        if old is None:
            raise NotFound(f"no pool {name!r}; known: {_names(listing)}")
        if revision is not None and revision != stored:
            raise Conflict(f"pool {name} was changed meanwhile (revision {stored}); read it again")
        await _refuse_loss(store, name, ((0, (1 << 128) - 1),), "deleting it", LISTED)
        blocks = await _blocks(store, name)
        _refuse_windows(name, blocks, "deleting it")
        result = await store.txn(transactions.undefine(old, listing.revision, blocks))
        if result.succeeded:
            log.info("pool.deleted", pool=old.describe())
            return len(blocks)
    raise Conflict(f"pool {name}: others keep changing the pools; try again")


def define(name: str, record: PoolRecord) -> Pool:
    """Raises `Invalid`."""
    try:
        return defined(name, record)
    except PoolError as error:
        raise Invalid(str(error)) from None


async def _write(
    store: Store,
    wanted: Pool,
    together: Iterable[Pool],
    unchanged: Callable[[Old, int], None],
    *,
    shown: int,
    dry_run: bool = False,
) -> tuple[Pool, str, int]:
    for _ in range(ATTEMPTS):
        listing = await store.list(POOLS)
        old, stored = _find(listing, wanted.name)
        unchanged(old, stored)
        if old == wanted:
            return wanted, "unchanged", stored
        others = {pool.name: pool for pool in _stored(listing)}
        collision = overlap(wanted, {**others, **{p.name: p for p in together}}.values())
        collision = collision or foreign.overlap(wanted, await foreign.networks(store))
        if collision is not None:
            raise Invalid(collision)
        blocks = await _judge(store, old, wanted, shown)
        action = "created" if old is None else "changed"
        if dry_run:
            return wanted, action, stored
        result = await store.txn(transactions.define(wanted, old, listing.revision, blocks))
        if result.succeeded:
            log.info("pool.written", pool=wanted.describe(), state=action)
            return wanted, action, result.revision
    raise Conflict(f"pool {wanted.name}: others keep changing the pools; start again")


async def _judge(store: Store, old: Old, wanted: Pool, shown: int) -> list[Claimed]:
    """The blocks that go with what is given up. The words for the operator; the transaction checks
    the same once more."""
    if old is None:
        return []
    gone = transactions.given_up(old, wanted)
    lost = (*gone, *transactions.withheld(old, wanted))
    if lost:
        await _refuse_loss(store, wanted.name, lost, "the new definition", shown)
    resized = transactions.resized(old, wanted)
    if not lost and not resized:
        return []
    blocks = await _blocks(store, wanted.name)
    if resized and blocks:
        raise Invalid(
            f"pool {wanted.name}: block sizes cannot change from"
            f" /{old.block_size} and /{old.block_size_v6} to"
            f" /{wanted.block_size} and /{wanted.block_size_v6} while nodes hold blocks"
            f" ({len(blocks)}, {blocks[0].block} for one); blocks are given back a minute after"
            " their last address is released"
        )
    _refuse_windows(
        wanted.name, [c for c in blocks if _touches(c.block, lost)], "the new definition"
    )
    return [claimed for claimed in blocks if _touches(claimed.block, gone)]


async def _refuse_loss(store: Store, name: str, lost: Ranges, what: str, shown: int) -> None:
    addresses = await store.list(f"{ADDRESSES}{name}/")
    hit = [
        kv
        for kv in addresses.items
        if any(low <= parse_address_key(kv.key)[1] <= high for low, high in lost)
    ]
    if hit:
        raise Invalid(
            f"pool {name}: {what} loses {len(hit)} addresses in use"
            f" ({_examples(hit, shown)}); release them first, or put the range back"
        )


def _refuse_windows(name: str, blocks: Sequence[Claimed], what: str) -> None:
    """A node may have handed out of its window what the store has yet to be told."""
    kept = [claimed for claimed in blocks if claimed.window]
    if kept:
        some = ", ".join(f"{claimed.block} of {claimed.node}" for claimed in kept[:SHOWN])
        more = ", ..." if len(kept) > SHOWN else ""
        raise Invalid(
            f"pool {name}: {what} takes away {len(kept)} blocks in which nodes keep windows"
            f" ({some}{more}); disable the range first (disabled = [CIDR]), then the nodes give"
            " them back within seconds"
        )


async def _blocks(store: Store, name: str) -> list[Claimed]:
    """Read after the pools; the transaction refuses what came in between."""
    listing = await store.list(f"{BLOCKS}{name}/")
    return [rows.claimed_of(kv) for kv in listing.items]


def _touches(block: Block, ranges: Ranges) -> bool:
    return any(low <= block.last and high >= block.base for low, high in ranges)


def _find(listing: Listing, name: str) -> tuple[Old, int]:
    for kv, pool in zip(listing.items, _stored(listing), strict=True):
        if pool.name == name:
            return pool, kv.mod_revision
    return None, 0


def _stored(listing: Listing) -> list[Pool]:
    try:
        return [rows.pool_of(kv) for kv in listing.items]
    except ValueError as error:
        raise Invalid(f"a stored pool cannot be read, was it edited by hand? {error}") from None


def _names(listing: Listing) -> str:
    return ", ".join(parse_pool_key(kv.key) for kv in listing.items) or "none"


def _examples(hit: Sequence[KeyValue], shown: int) -> str:
    held = [rows.assigned_of(kv) for kv in hit[:shown]]
    text = ", ".join(f"{address_text(a.address)} of {a.owner}" for a in held)
    return text + (", ..." if len(hit) > shown else "")
