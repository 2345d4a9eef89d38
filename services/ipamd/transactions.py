"""The address service's transactions. What is compared is what makes them safe:

    take       no such address, not cooling, the block still that node's, no address for the owner
    release    owner and address as last seen (both have the revision of the take)
    claim      nobody has the block, the pool still as it was cut
    give back  no address in the block, the block still that node's
    define     the pools as they were validated, no address in what is given up

A take and a give-back of its block therefore exclude each other, and so do a claim and a change
of its pool. An ELSE branch reads what stood in the way.
"""

from __future__ import annotations

from ipaddress import IPv4Network

import msgspec

from ipam.allocate import Claim, Request, Take
from ipam.keys import (
    BLOCKS,
    POOLS,
    AddressRecord,
    BlockRecord,
    OwnerRecord,
    PoolRecord,
    address_key,
    address_range,
    block_key,
    cool_key,
    owner_key,
    pool_key,
)
from ipam.pool import Pool, address_text, edges, first, last
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
from services.store.txn import absent, mod_is, prefix_empty, value_is

_encode = msgspec.json.encode


def take(request: Request, decision: Take, now_s: float) -> Txn:
    pool, owner, block = request.pool, request.owner, decision.claim.block
    address, own = address_key(pool, decision.address), owner_key(owner)
    held, cooling = block_key(pool, block), cool_key(pool, decision.address)
    address_record = AddressRecord(
        owner.namespace,
        owner.name,
        owner.interface,
        owner.uid,
        request.node,
        str(block),
        now_s,
    )
    owner_record = OwnerRecord(
        pool, address_text(decision.address), str(block), request.node, owner.uid
    )
    return Txn(
        compares=(
            absent(address),
            absent(cooling),
            value_is(held, decision.claim.value),
            absent(own),
        ),
        success=(Put(address, _encode(address_record)), Put(own, _encode(owner_record))),
        failure=(Range(own), Range(address), Range(held), Range(cooling)),
    )


def release(assigned: Assigned, lease: LeaseId | None) -> Txn:
    """`lease` None: the address may be handed out again at once."""
    address, own = address_key(assigned.pool, assigned.address), owner_key(assigned.owner)
    seen = Revision(assigned.revision)
    success: tuple[Operation, ...] = (Delete(address), Delete(own))
    if lease is not None:
        cooling = cool_key(assigned.pool, assigned.address)
        success = (*success, Put(cooling, str(assigned.block).encode(), lease))
    return Txn(compares=(mod_is(own, seen), mod_is(address, seen)), success=success)


def claim(pool: str, pool_revision: int, decision: Claim, node: str, now_s: float) -> Txn:
    key, definition = block_key(pool, decision.block), pool_key(pool)
    return Txn(
        compares=(absent(key), mod_is(definition, Revision(pool_revision))),
        success=(Put(key, _encode(BlockRecord(node, now_s))),),
        failure=(Range(key), Range(definition)),
    )


def give_back(claimed: Claimed) -> Txn:
    key, block = block_key(claimed.pool, claimed.block), claimed.block
    return Txn(
        compares=(_empty(claimed.pool, block.base, block.last), value_is(key, claimed.value)),
        success=(Delete(key),),
    )


def define(wanted: Pool, old: Pool | None, listed: Revision) -> Txn:
    """`listed`: the revision at which the pools were read and `wanted` was found to fit."""
    unchanged = Compare(POOLS, Target.MOD, Relation.LESS, listed + 1, range_end=prefix_end(POOLS))
    put = Put(pool_key(wanted.name), _encode(record_of(wanted)))
    if old is None:
        return Txn(compares=(unchanged,), success=(put,))
    gone = given_up(old, wanted)
    empty = tuple(_empty(wanted.name, low, high) for low, high in (*gone, *withheld(old, wanted)))
    if old.block_size != wanted.block_size:
        return Txn((unchanged, *empty, prefix_empty(f"{BLOCKS}{wanted.name}/")), (put,))
    # Without its block, no take in what is given up can succeed any more.
    blocks = tuple(_blocks_between(wanted.name, low, high) for low, high in gone)
    return Txn((unchanged, *empty), (put, *blocks))


def given_up(old: Pool, new: Pool) -> tuple[tuple[int, int], ...]:
    """first..last of what only the old definition covers."""
    rest = list(old.cidrs)
    for kept in new.cidrs:
        parts: list[IPv4Network] = []
        for network in rest:
            if network.subnet_of(kept):
                continue
            parts += network.address_exclude(kept) if kept.subnet_of(network) else [network]
        rest = parts
    return tuple((first(network), last(network)) for network in rest)


def withheld(old: Pool, new: Pool) -> tuple[tuple[int, int], ...]:
    """first..last of what the new definition covers but no longer hands out."""
    ranges = [(first(n), last(n)) for n in new.reserved if n not in old.reserved]
    before = {edge for cidr in old.cidrs for edge in edges(cidr)}
    ranges += [(e, e) for cidr in new.cidrs for e in edges(cidr) if e not in before]
    return tuple(ranges)


def record_of(pool: Pool) -> PoolRecord:
    return PoolRecord(
        cidrs=tuple(map(str, pool.cidrs)),
        block_size=pool.block_size,
        reserved=tuple(map(str, pool.reserved)),
    )


def _empty(pool: str, low: int, high: int) -> Compare:
    key, end = address_range(pool, low, high)
    return Compare(key, Target.CREATE, Relation.EQUAL, 0, range_end=end)


def _blocks_between(pool: str, low: int, high: int) -> Delete:
    key, end = address_range(pool, low, high)
    prefix = f"{BLOCKS}{pool}/"
    # A block key goes on after the address with "-<size>", which sorts before "~".
    start, stop = key.rpartition("/")[2], end.rpartition("/")[2].removesuffix("\0")
    return Delete(prefix + start, range_end=prefix + stop + "~")
