"""The configured pools, written to the store when the service starts.

A pool that only the store has is kept: another replica's configuration may be newer. A changed
pool is written only when no address in use is lost by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ipam.keys import ADDRESSES, BLOCKS, POOLS, parse_address_key, parse_block_key
from ipam.pool import Pool, PoolError, address_text, define, overlap
from services.ipamd import rows, transactions
from services.runtime.config import PoolConfig
from services.runtime.errors import Conflict, Invalid
from services.runtime.log import logger
from services.store.model import Listing, Store

log = logger(__name__)

ATTEMPTS = 5
SHOWN = 3


async def ensure(store: Store, configured: Mapping[str, PoolConfig]) -> None:
    """Raises `Invalid` with what is wrong, `Conflict` when others keep changing the pools."""
    wanted = [_define(name, pool) for name, pool in configured.items()]
    for pool in wanted:
        await _ensure_one(store, pool, wanted)


async def _ensure_one(store: Store, wanted: Pool, configured: Iterable[Pool]) -> None:
    for _ in range(ATTEMPTS):
        listing = await store.list(POOLS)
        stored = {pool.name: pool for pool in _stored(listing)}
        old = stored.get(wanted.name)
        if old == wanted:
            return
        collision = overlap(wanted, {**stored, **{p.name: p for p in configured}}.values())
        if collision is not None:
            raise Invalid(collision)
        if old is not None:
            await _refuse_loss(store, old, wanted)
        result = await store.txn(transactions.define(wanted, old, listing.revision))
        if result.succeeded:
            state = "created" if old is None else "changed"
            log.info("pool.written", pool=wanted.describe(), state=state)
            return
    raise Conflict(f"pool {wanted.name}: others keep changing the pools; start again")


def _stored(listing: Listing) -> list[Pool]:
    try:
        return [rows.pool_of(kv) for kv in listing.items]
    except ValueError as error:
        raise Invalid(f"a stored pool cannot be read, was it edited by hand? {error}") from None


async def _refuse_loss(store: Store, old: Pool, wanted: Pool) -> None:
    """The words for the operator; the transaction checks the same once more."""
    addresses = await store.list(f"{ADDRESSES}{wanted.name}/")
    lost = (*transactions.given_up(old, wanted), *transactions.withheld(old, wanted))
    hit = [
        kv
        for kv in addresses.items
        if any(low <= parse_address_key(kv.key)[1] <= high for low, high in lost)
    ]
    if hit:
        raise Invalid(
            f"pool {wanted.name}: the new definition loses {len(hit)} addresses in use"
            f" ({_examples(Listing(addresses.revision, tuple(hit)))});"
            " release them first, or put the range back"
        )
    if old.block_size != wanted.block_size:
        blocks = await store.list(f"{BLOCKS}{wanted.name}/")
        if blocks.items:
            block = parse_block_key(blocks.items[0].key)[1]
            raise Invalid(
                f"pool {wanted.name}: block_size cannot change from {old.block_size} to"
                f" {wanted.block_size} while nodes hold blocks ({len(blocks.items)}, {block} for"
                " one); blocks are given back a minute after their last address is released"
            )


def _examples(listing: Listing) -> str:
    held = [rows.assigned_of(kv) for kv in listing.items[:SHOWN]]
    text = ", ".join(f"{address_text(a.address)} of {a.owner}" for a in held)
    return text + (", ..." if len(listing.items) > SHOWN else "")


def _define(name: str, config: PoolConfig) -> Pool:
    try:
        return define(name, config.cidrs, config.block_size, config.reserved)
    except PoolError as error:
        raise Invalid(f"[ipamd.pools.{name}]: {error}") from None
