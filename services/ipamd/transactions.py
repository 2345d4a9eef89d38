"""The address service's transactions. What is compared is what makes them safe:

    take       no such addresses, not cooling, the blocks still those nodes', none for the owner
    resume     owner and addresses as last seen
    replay     no such addresses, the block still this node's; its journal has handed them out
    release    addresses as last seen; the owner's key goes when it is of the same allocation
    keep       the same, but everything stays, for the owner alone, until it asks or time is up
    claim      nobody has the block, the pool still as it was cut
    narrow     the block as last seen; what leaves the window becomes the service's to give
    give back  no address in the block, the block still that node's
    define     the pools as they were validated, no address in what is given up

A take and a give-back of its block therefore exclude each other, and so do a claim and a change
of its pool. An ELSE branch reads what stood in the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ipam.allocate import Pick, Request
from ipam.block import Block
from ipam.keys import (
    ADDRESSES,
    BLOCKS,
    COOLING,
    POOLS,
    AddressRecord,
    BlockRecord,
    NodeRecord,
    Owner,
    OwnerRecord,
    PoolRecord,
    address_key,
    address_range,
    block_key,
    cool_key,
    node_key,
    owned,
    owner_key,
    pool_key,
)
from ipam.pool import Pool, edges, span
from ipam.ranges import Ranges, without
from ipam.view import Assigned, Claimed
from services.store.model import (
    Compare,
    Delete,
    LeaseId,
    Operation,
    Put,
    Range,
    Relation,
    Revision,
    Target,
    Txn,
    prefix_end,
)
from services.store.txn import absent, mod_is, value_is

_encode = msgspec.json.encode


def take(request: Request, picks: Sequence[Pick], now_s: float) -> Txn:
    own = owner_key(request.owner)
    compares, failure = [absent(own)], [Range(own)]
    for pick in picks:
        address, block = address_key(request.pool, pick.address), _block_key(pick.claim)
        cooling = cool_key(request.pool, pick.address)
        compares += [absent(address), absent(cooling), value_is(block, pick.claim.value)]
        failure += [Range(address), Range(cooling), Range(block)]
    places = [(pick.address, pick.claim.block) for pick in picks]
    return Txn(tuple(compares), _written(request, places, now_s), tuple(failure))


def resume(request: Request, kept: Sequence[Assigned], now_s: float) -> Txn:
    own = owner_key(kept[0].owner)
    places = [(row.address, row.block) for row in kept]
    return Txn((*_seen(kept), mod_is(own, _revision(kept))), _written(request, places, now_s))


def replay(request: Request, picks: Sequence[Pick], handed_out_at: float) -> Txn:
    """The owner's key is left alone when an earlier incarnation has it."""
    own = owner_key(request.owner)
    compares: list[Compare] = []
    failure: list[Range] = []
    for pick in picks:
        address, block = address_key(request.pool, pick.address), _block_key(pick.claim)
        compares += [absent(address), value_is(block, pick.claim.value)]
        failure += [Range(address), Range(block)]
    places = [(pick.address, pick.claim.block) for pick in picks]
    *addresses, owner = _written(request, places, handed_out_at)
    return Txn(tuple(compares), (*addresses, Txn((absent(own),), (owner,))), tuple(failure))


def release(rows: Sequence[Assigned], lease: LeaseId | None, guards: Sequence[Compare] = ()) -> Txn:
    """`rows`: of one allocation. `lease` None: they may be handed out again at once."""
    own, success = owner_key(rows[0].owner), list[Operation]()
    for row in rows:
        success.append(Delete(address_key(row.pool, row.address)))
        if lease is not None:
            cooling = cool_key(row.pool, row.address)
            success.append(Put(cooling, str(row.block).encode(), lease))
    success.append(Txn((mod_is(own, _revision(rows)),), (Delete(own),)))
    return Txn((*_seen(rows), *guards), tuple(success))


def keep(rows: Sequence[Assigned], until_s: float) -> Txn:
    own, row = owner_key(rows[0].owner), rows[0]
    request = Request(row.node, row.owner, row.pool, retain_s=row.retain_s)
    places = [(row.address, row.block) for row in rows]
    success = _written(request, places, until_s - row.retain_s, retained_until=until_s)
    return Txn((*_seen(rows), mod_is(own, _revision(rows))), success)


def claim(pool: str, pool_revision: int, block: Block, record: BlockRecord) -> Txn:
    key, definition = block_key(pool, block), pool_key(pool)
    return Txn(
        compares=(absent(key), mod_is(definition, Revision(pool_revision))),
        success=(Put(key, _encode(record)),),
        failure=(Range(key), Range(definition)),
    )


def narrow(claimed: Claimed, size: int, guards: Sequence[Compare] = ()) -> Txn:
    """The window becomes the block's first `size` addresses; 0: all of it is the service's."""
    key, record = _block_key(claimed), msgspec.json.decode(claimed.value, type=BlockRecord)
    created = Compare(key, Target.CREATE, Relation.EQUAL, claimed.created)
    put = Put(key, _encode(msgspec.structs.replace(record, window=size)))
    return Txn((created, value_is(key, claimed.value), *guards), (put,), (Range(key),))


def read_block(pool: str, block: Block) -> Txn:
    """At one revision: the block, its addresses, those that are cooling."""
    key = block_key(pool, block)
    return Txn(
        success=(Range(key), in_block(pool, block, ADDRESSES), in_block(pool, block, COOLING))
    )


def give_back(claimed: Claimed, guards: Sequence[Compare] = ()) -> Txn:
    key, block = _block_key(claimed), claimed.block
    return Txn(
        compares=(
            _empty(claimed.pool, block.base, block.last),
            value_is(key, claimed.value),
            *guards,
        ),
        success=(Delete(key),),
    )


def heard(node: str, record: NodeRecord) -> Put:
    return Put(node_key(node), _encode(record))


def define(wanted: Pool, old: Pool | None, listed: Revision, blocks: Sequence[Claimed] = ()) -> Txn:
    """`listed`: the revision at which the pools were read and `wanted` was found to fit. `blocks`:
    those in what is given up, as read then; they go with it."""
    put = Put(pool_key(wanted.name), _encode(record_of(wanted)))
    if old is None:
        return Txn((_pools_unchanged(listed),), (put,))
    lost = (*given_up(old, wanted), *withheld(old, wanted))
    empty = [_empty(wanted.name, *part) for part in lost]
    if resized(old, wanted):
        lost = tuple(map(span, old.cidrs))
    # Without its block, no take in what is given up can succeed any more.
    unchanged = [_blocks_unchanged(wanted.name, *_whole(old, *part), listed) for part in lost]
    deletes = tuple(Delete(_block_key(claimed)) for claimed in blocks)
    return Txn((_pools_unchanged(listed), *empty, *unchanged), (put, *deletes))


def undefine(pool: Pool, listed: Revision, blocks: Sequence[Claimed]) -> Txn:
    parts = [span(cidr) for cidr in pool.cidrs]
    return Txn(
        (
            _pools_unchanged(listed),
            *(_empty(pool.name, *part) for part in parts),
            *(_blocks_unchanged(pool.name, *part, listed) for part in parts),
        ),
        (Delete(pool_key(pool.name)), *(Delete(_block_key(claimed)) for claimed in blocks)),
    )


def given_up(old: Pool, new: Pool) -> Ranges:
    """What only the old definition covers."""
    kept = tuple(sorted(map(span, new.cidrs)))
    return without(map(span, old.cidrs), kept)


def withheld(old: Pool, new: Pool) -> Ranges:
    """What the new definition covers but never hands out, and the old one did. Disabling withholds
    nothing: what is in use there lives on."""
    before = tuple(sorted(map(span, old.reserved)))
    ranges = without(map(span, new.reserved), before)
    known = {edge for cidr in old.cidrs for edge in edges(cidr)}
    fresh = (e for cidr in new.cidrs for e in edges(cidr) if e not in known)
    return (*ranges, *((e, e) for e in fresh))


def resized(old: Pool, new: Pool) -> bool:
    """The blocks are cut otherwise."""
    return any(old.size_of(f) != new.size_of(f) for f in old.families)


def record_of(pool: Pool) -> PoolRecord:
    return PoolRecord(
        cidrs=tuple(map(str, pool.cidrs)),
        block_size=pool.block_size,
        block_size_v6=pool.block_size_v6,
        reserved=tuple(map(str, pool.reserved)),
        disabled=tuple(map(str, pool.disabled)),
        namespaces=pool.namespaces,
        strict=pool.strict,
        max_blocks=pool.max_blocks,
        local=pool.local,
        cooldown_s=pool.cooldown_s,
    )


def in_block(pool: str, block: Block, prefix: str) -> Range:
    key, end = address_range(pool, block.base, block.last, prefix)
    return Range(key, end)


def _written(
    request: Request,
    places: Sequence[tuple[int, Block]],
    now_s: float,
    retained_until: float = 0.0,
) -> tuple[Put, ...]:
    """The addresses' keys, and the owner's as the last."""
    owner: Owner = request.owner
    puts = [
        Put(
            address_key(request.pool, address),
            _encode(
                AddressRecord(
                    owner.namespace,
                    owner.name,
                    owner.interface,
                    owner.uid,
                    request.node,
                    str(block),
                    now_s,
                    request.retain_s,
                    retained_until,
                )
            ),
        )
        for address, block in places
    ]
    record = OwnerRecord(
        request.pool,
        tuple(owned(address, block) for address, block in places),
        request.node,
        owner.uid,
        request.retain_s,
        retained_until,
    )
    return (*puts, Put(owner_key(owner), _encode(record)))


def _seen(rows: Sequence[Assigned]) -> tuple[Compare, ...]:
    return tuple(mod_is(address_key(row.pool, row.address), Revision(row.revision)) for row in rows)


def _revision(rows: Sequence[Assigned]) -> Revision:
    return Revision(rows[0].revision)


def _block_key(claimed: Claimed) -> str:
    return block_key(claimed.pool, claimed.block)


def _empty(pool: str, low: int, high: int) -> Compare:
    key, end = address_range(pool, low, high)
    return Compare(key, Target.CREATE, Relation.EQUAL, 0, range_end=end)


def _pools_unchanged(listed: Revision) -> Compare:
    return Compare(POOLS, Target.MOD, Relation.LESS, listed + 1, range_end=prefix_end(POOLS))


def _whole(pool: Pool, low: int, high: int) -> tuple[int, int]:
    """From where the block begins in which the range does."""
    block = pool.block_of(low)
    return (low if block is None else block.base), high


def _blocks_unchanged(pool: str, low: int, high: int, listed: Revision) -> Compare:
    key, end = address_range(pool, low, high, BLOCKS)
    return Compare(key, Target.MOD, Relation.LESS, listed + 1, range_end=end)
