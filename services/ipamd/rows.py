"""Stored keys and values to rows of the view.

A value that cannot be read is logged and left out: the address under such a key stays taken,
because every take compares the key itself.
"""

from __future__ import annotations

import msgspec

from ipam.block import parse_address, parse_block
from ipam.keys import (
    ADDRESSES,
    BLOCKS,
    COOLING,
    NODES,
    POOLS,
    AddressRecord,
    BlockRecord,
    NodeRecord,
    Owner,
    OwnerRecord,
    PoolRecord,
    defined,
    parse_address_key,
    parse_block_key,
    parse_node_key,
    parse_pool_key,
)
from ipam.pool import Pool
from ipam.view import Assigned, Claimed, View
from services.runtime.log import logger
from services.store.model import Changed, KeyValue, Put, Removed, Revision, Txn

log = logger(__name__)

# What the view is made of, in the order in which rows make sense.
WATCHED = (POOLS, BLOCKS, COOLING, ADDRESSES, NODES)

_pool = msgspec.json.Decoder(PoolRecord)
_block = msgspec.json.Decoder(BlockRecord)
_address = msgspec.json.Decoder(AddressRecord)
_owner = msgspec.json.Decoder(OwnerRecord)
_node = msgspec.json.Decoder(NodeRecord)


def apply(view: View, event: Changed | Removed) -> None:
    key = event.kv.key if isinstance(event, Changed) else event.key
    try:
        if isinstance(event, Changed):
            _put(view, event.kv)
        else:
            _remove(view, event.key, event.revision)
    except ValueError as error:
        log.warning("ipam.unreadable", name=key, error=str(error))


def _put(view: View, kv: KeyValue) -> None:
    if kv.key.startswith(ADDRESSES):
        view.put_address(assigned_of(kv))
    elif kv.key.startswith(COOLING):
        pool, address = parse_address_key(kv.key, COOLING)
        view.put_cooling(pool, address, parse_block(kv.value.decode()))
    elif kv.key.startswith(BLOCKS):
        view.put_block(claimed_of(kv))
    elif kv.key.startswith(NODES):
        view.put_node(parse_node_key(kv.key), _node.decode(kv.value), kv.mod_revision)
    elif kv.key.startswith(POOLS):
        view.put_pool(pool_of(kv), kv.mod_revision)


def _remove(view: View, key: str, revision: int) -> None:
    if key.startswith(ADDRESSES):
        view.remove_address(*parse_address_key(key), revision)
    elif key.startswith(COOLING):
        view.remove_cooling(*parse_address_key(key, COOLING))
    elif key.startswith(BLOCKS):
        view.remove_block(*parse_block_key(key), revision)
    elif key.startswith(NODES):
        view.remove_node(parse_node_key(key), revision)
    elif key.startswith(POOLS):
        view.remove_pool(parse_pool_key(key), revision)


def written(txn: Txn, revision: Revision) -> tuple[Changed, ...]:
    """What a transaction that succeeded at `revision` created, as the watch will tell it."""
    return tuple(
        Changed(KeyValue(op.key, op.value, revision, revision, 1, op.lease))
        for op in txn.success
        if isinstance(op, Put)
    )


def pool_of(kv: KeyValue) -> Pool:
    """Raises ValueError, as do the others."""
    return defined(parse_pool_key(kv.key), _pool.decode(kv.value))


def claimed_of(kv: KeyValue) -> Claimed:
    """Of a `blk` key."""
    pool, block = parse_block_key(kv.key)
    record = _block.decode(kv.value)
    return Claimed(
        pool, block, record.node, kv.value, kv.mod_revision, record.window, kv.create_revision
    )


def cooling_of(kv: KeyValue) -> int:
    """The address of a `cool` key."""
    return parse_address_key(kv.key, COOLING)[1]


def assigned_of(kv: KeyValue) -> Assigned:
    """Of an `ip` key."""
    pool, address = parse_address_key(kv.key)
    record = _address.decode(kv.value)
    return Assigned(
        pool,
        address,
        parse_block(record.block),
        record.node,
        record.owner,
        kv.mod_revision,
        record.retain_s,
        record.retained_until,
    )


def owned_of(owner: Owner, kv: KeyValue) -> tuple[Assigned, ...]:
    """Of the `own` key of `owner`."""
    record = _owner.decode(kv.value)
    who = Owner(owner.namespace, owner.name, owner.interface, record.uid)
    return tuple(
        Assigned(
            record.pool,
            parse_address(one.ip),
            parse_block(one.block),
            record.node,
            who,
            kv.mod_revision,
            record.retain_s,
            record.retained_until,
        )
        for one in record.addresses
    )
