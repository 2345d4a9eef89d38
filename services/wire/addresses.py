"""The address service's values to protobuf messages and back.

`*_from_wire` validates: a message that no correct peer sends raises `Invalid`.
"""

from __future__ import annotations

from collections.abc import Iterable

from tessera_wire.ipam.v1 import ipam_pb2

from ipam.block import Block, Family, address_text, parse_address, parse_block
from ipam.keys import Owner, PoolRecord
from ipam.view import Assigned, Claimed
from services.runtime.errors import Invalid

# What a JSON reader can still be trusted with would be less; this is what fits the field's sign.
_MOST = 2**63 - 1


def owner_to_wire(owner: Owner) -> ipam_pb2.Owner:
    return ipam_pb2.Owner(
        namespace=owner.namespace, name=owner.name, interface=owner.interface, uid=owner.uid
    )


def owner_from_wire(message: ipam_pb2.Owner) -> Owner:
    owner = Owner(message.namespace, message.name, message.interface, message.uid)
    problem = owner.problem()
    if problem is not None:
        raise Invalid(problem)
    return owner


def address_from_wire(text: str) -> int:
    try:
        return parse_address(text)
    except ValueError:
        raise Invalid(f"{text!r} is not an IP address") from None


def addresses_from_wire(texts: Iterable[str]) -> tuple[int, ...]:
    return tuple(map(address_from_wire, texts))


def block_from_wire(text: str) -> Block:
    try:
        return parse_block(text)
    except ValueError:
        raise Invalid(f"{text!r} is not a block") from None


def family_from_wire(number: int) -> Family:
    try:
        return Family(number)
    except ValueError:
        raise Invalid(f"family {number} is neither 4 nor 6") from None


def assigned_to_wire(assigned: Assigned) -> ipam_pb2.Address:
    return ipam_pb2.Address(
        ip=address_text(assigned.address),
        pool=assigned.pool,
        block=str(assigned.block),
        node=assigned.node,
        owner=owner_to_wire(assigned.owner),
        revision=assigned.revision,
        retained_until=assigned.retained_until,
    )


def assigned_from_wire(message: ipam_pb2.Address) -> Assigned:
    return Assigned(
        pool=message.pool,
        address=address_from_wire(message.ip),
        block=block_from_wire(message.block),
        node=message.node,
        owner=owner_from_wire(message.owner),
        revision=message.revision,
        retained_until=message.retained_until,
    )


def claimed_to_wire(claimed: Claimed, used: int) -> ipam_pb2.Block:
    return ipam_pb2.Block(
        cidr=str(claimed.block),
        pool=claimed.pool,
        node=claimed.node,
        used=used,
        size=count_to_wire(claimed.block.count),
        window=claimed.window,
    )


def count_to_wire(count: int) -> int:
    """IPv6 has more than a number on the wire holds."""
    return min(count, _MOST)


def spec_to_wire(record: PoolRecord) -> ipam_pb2.PoolSpec:
    return ipam_pb2.PoolSpec(
        cidrs=record.cidrs,
        block_size=record.block_size,
        block_size_v6=record.block_size_v6,
        reserved=record.reserved,
        disabled=record.disabled,
        namespaces=record.namespaces,
        strict=record.strict,
        max_blocks=record.max_blocks,
        local=record.local,
        cooldown_s=record.cooldown_s,
    )


def spec_from_wire(message: ipam_pb2.PoolSpec) -> PoolRecord:
    return PoolRecord(
        cidrs=tuple(message.cidrs),
        block_size=message.block_size,
        block_size_v6=message.block_size_v6,
        reserved=tuple(message.reserved),
        disabled=tuple(message.disabled),
        namespaces=tuple(message.namespaces),
        strict=message.strict,
        max_blocks=message.max_blocks,
        local=message.local,
        cooldown_s=message.cooldown_s if message.HasField("cooldown_s") else None,
    )
