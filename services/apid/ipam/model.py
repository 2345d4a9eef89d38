"""Addresses, as REST shows them."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

Cidrs = tuple[Annotated[str, Meta(examples=["10.244.0.0/16"])], ...]


class PoolSpec(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an operator decides of a pool. `block_size`, `block_size_v6`: prefix lengths of what a
    node draws from. `reserved`: never handed out. `disabled`: nothing new is handed out, and nodes
    give their windows there back. `namespaces`: whose endpoints draw from here; patterns with `*`.
    `strict`: no borrowing from other nodes' blocks. `max_blocks`: of a node and family; 0: any.
    `local`: nodes keep a window of each block and hand it out by themselves. `cooldown_s`: before
    an address is given again; null: as the service is configured."""

    cidrs: Cidrs
    block_size: Annotated[int, Meta(ge=0, le=32)] = 26
    block_size_v6: Annotated[int, Meta(ge=0, le=128)] = 122
    reserved: Cidrs = ()
    disabled: Cidrs = ()
    namespaces: tuple[str, ...] = ()
    strict: bool = False
    max_blocks: Annotated[int, Meta(ge=0, le=2**31)] = 0
    local: bool = True
    cooldown_s: Annotated[int, Meta(ge=0, le=86_400)] | None = None


class PoolUsage(Struct, frozen=True):
    """Of one family. `in_windows`: free, and handed out by their nodes alone. `retained`: kept for
    owners that are away. `exhausted_in_s`: at the last hour's rate; null while use does not grow.
    Numbers beyond 2^63 are shown as that."""

    family: int
    capacity: int
    used: int
    cooling: int
    retained: int
    in_windows: int
    blocks: int
    per_hour: float
    exhausted_in_s: float | None


class Pool(Struct, frozen=True):
    name: str
    spec: PoolSpec
    usage: tuple[PoolUsage, ...]
    revision: int


class Pools(Struct, frozen=True):
    pools: tuple[Pool, ...]


class PoolWritten(Struct, frozen=True):
    """`action`: created, changed or unchanged."""

    pool: Pool
    action: str


class PoolDeleted(Struct, frozen=True):
    """`blocks`: how many went with it."""

    blocks: int


class Block(Struct, frozen=True):
    """`window`: so many of its first addresses are handed out by its node alone."""

    cidr: str
    pool: str
    node: str
    used: int
    size: int
    window: int


class Blocks(Struct, frozen=True):
    blocks: tuple[Block, ...]
    next: str = ""


class Owner(Struct, frozen=True):
    namespace: str
    name: str
    interface: str
    uid: str


class Address(Struct, frozen=True):
    """`retained_until`: seconds since 1970; not 0: released, and kept for its owner until then."""

    ip: str
    pool: str
    block: str
    node: str
    owner: Owner
    revision: int
    retained_until: float


class Addresses(Struct, frozen=True):
    addresses: tuple[Address, ...]
    next: str = ""


class Released(Struct, frozen=True):
    """Every address of the owner, of both families."""

    released: tuple[Address, ...]


class NodeForgotten(Struct, frozen=True):
    addresses: int
    blocks: int


class Leak(Struct, frozen=True):
    """`releases_in_s`: when it is released by itself; null: not before more is known."""

    address: Address
    reason: str
    releases_in_s: float | None


class Leaks(Struct, frozen=True):
    leaks: tuple[Leak, ...]
