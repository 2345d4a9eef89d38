"""Addresses, as REST shows them."""

from __future__ import annotations

from msgspec import Struct


class Pool(Struct, frozen=True):
    name: str
    cidrs: tuple[str, ...]
    block_size: int
    capacity: int
    used: int


class Pools(Struct, frozen=True):
    pools: tuple[Pool, ...]


class Block(Struct, frozen=True):
    cidr: str
    pool: str
    node: str
    used: int
    size: int


class Blocks(Struct, frozen=True):
    blocks: tuple[Block, ...]
    next: str = ""


class Owner(Struct, frozen=True):
    namespace: str
    name: str
    interface: str
    uid: str


class Address(Struct, frozen=True):
    ip: str
    pool: str
    block: str
    node: str
    owner: Owner


class Addresses(Struct, frozen=True):
    addresses: tuple[Address, ...]
    next: str = ""
