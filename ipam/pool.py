"""A pool: CIDRs of one or both families, cut into blocks of one size per family.

Network and broadcast address are lost once per CIDR, not once per block: only the blocks at the
CIDR's own edges carry them. IPv6 loses the first address alone (subnet-router anycast, RFC 4291
section 2.6.1); CIDRs of one or two addresses lose none (RFC 3021, RFC 6164).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from ipaddress import AddressValueError, NetmaskValueError, ip_network

from ipam.block import V6_FROM, Block, Family, Network, family_of
from ipam.ranges import Range, Ranges, around, merged, size, within

DEFAULT_POOL = "default"
BLOCK_SIZE = 26
BLOCK_SIZE_V6 = 122

# A node that holds 4096 addresses starves the others; IPv6 has no such shortage.
_SMALLEST = {Family.V4: 20, Family.V6: 64}

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


class PoolError(ValueError):
    """What is wrong with a pool's definition, in words for the operator."""


@dataclass(frozen=True, slots=True)
class Pool:
    """`reserved`: never handed out. `disabled`: nothing new is handed out, what is in use lives on.
    `namespaces`: whose endpoints draw from here unless they name a pool; patterns with `*`.
    `strict`: nobody borrows from another node's block. `max_blocks`: per node and family, 0 for any
    number. `local`: nodes keep a window of their blocks to hand out by themselves. `cooldown_s`:
    None for the service's. `lost`: what is not handed out, of edges, reserved and disabled."""

    name: str
    cidrs: tuple[Network, ...]
    block_size: int = BLOCK_SIZE
    block_size_v6: int = BLOCK_SIZE_V6
    reserved: tuple[Network, ...] = ()
    disabled: tuple[Network, ...] = ()
    namespaces: tuple[str, ...] = ()
    strict: bool = False
    max_blocks: int = 0
    local: bool = True
    cooldown_s: int | None = None
    lost: Ranges = field(default=(), compare=False, repr=False)

    @property
    def families(self) -> tuple[Family, ...]:
        return tuple(sorted({Family(cidr.version) for cidr in self.cidrs}))

    def size_of(self, family: Family) -> int:
        return self.block_size if family is Family.V4 else self.block_size_v6

    def capacity(self, family: Family) -> int:
        """Addresses that can be handed out."""
        return sum(
            cidr.num_addresses - size(within(self.lost, first(cidr), last(cidr)))
            for cidr in self.cidrs
            if cidr.version == family
        )

    def cidr_of(self, address: int) -> Network | None:
        family = family_of(address)
        return next(
            (c for c in self.cidrs if c.version == family and first(c) <= address <= last(c)), None
        )

    def block_of(self, address: int) -> Block | None:
        if self.cidr_of(address) is None:
            return None
        family = family_of(address)
        length = self.size_of(family)
        host_bits = family.bits - length
        return Block(address >> host_bits << host_bits, length)

    def owns(self, block: Block) -> bool:
        return block.size == self.size_of(block.family) and self.cidr_of(block.base) is not None

    def usable(self, block: Block) -> int:
        """How many of the block's addresses may be handed out."""
        if self.cidr_of(block.base) is None:
            return 0
        return block.count - size(within(self.lost, block.base, block.last))

    def withheld(self, address: int) -> str | None:
        """Why an address of the pool is not handed out, in words."""
        if around(self.lost, address) is None:
            return None
        cidr = self.cidr_of(address)
        if cidr is not None and address in edges(cidr):
            return f"an edge of {cidr}"
        covers = [n for n in self.disabled if _covers(n, address)]
        return f"in {covers[0]}, which is disabled" if covers else "reserved"

    def serves(self, namespace: str) -> bool:
        return any(fnmatchcase(namespace, pattern) for pattern in self.namespaces)

    def describe(self) -> str:
        return f"{self.name} ({', '.join(map(str, self.cidrs))})"


def chosen(pools: Iterable[Pool], namespace: str, named: str = "") -> str:
    """The pool for an endpoint: the named one, else one that serves its namespace (an exact name
    before a pattern, then in order of names), else the default."""
    if named:
        return named
    serving = sorted(
        (namespace not in pool.namespaces, pool.name) for pool in pools if pool.serves(namespace)
    )
    return serving[0][1] if serving else DEFAULT_POOL


def define(
    name: str,
    cidrs: Sequence[str],
    block_size: int = BLOCK_SIZE,
    reserved: Sequence[str] = (),
    *,
    block_size_v6: int = BLOCK_SIZE_V6,
    disabled: Sequence[str] = (),
    namespaces: Sequence[str] = (),
    strict: bool = False,
    max_blocks: int = 0,
    local: bool = True,
    cooldown_s: int | None = None,
) -> Pool:
    """Raises `PoolError`."""
    if not _NAME.fullmatch(name):
        raise PoolError(f"pool {name!r}: a name is 1 to 63 of a-z, 0-9 and '-', no '-' at the ends")
    if not cidrs:
        raise PoolError(f"pool {name}: give at least one CIDR")
    networks = tuple(_network(name, text) for text in cidrs)
    kept = tuple(_network(name, text) for text in reserved)
    closed = tuple(_network(name, text) for text in disabled)
    _check_sizes(name, networks, block_size, block_size_v6)
    _refuse_overlap(name, networks)
    for what, some in (("reserved", kept), ("disabled", closed)):
        for network in some:
            if not any(_inside(network, cidr) for cidr in networks):
                raise PoolError(f"pool {name}: {what} {network} is outside the pool's CIDRs")
    if max_blocks < 0 or (cooldown_s or 0) < 0:
        raise PoolError(f"pool {name}: max_blocks and cooldown_s are not below 0")
    lost = [(e, e) for cidr in networks for e in edges(cidr)]
    pool = Pool(
        name,
        networks,
        block_size,
        block_size_v6,
        kept,
        closed,
        tuple(namespaces),
        strict,
        max_blocks,
        local,
        cooldown_s,
        merged([*lost, *map(span, (*kept, *closed))]),
    )
    if not closed and not any(map(pool.capacity, pool.families)):
        raise PoolError(f"pool {name}: no address is left to hand out; widen a CIDR")
    return pool


def overlap(pool: Pool, others: Iterable[Pool]) -> str | None:
    """What collides with another pool, in words; None when nothing does."""
    for other in others:
        if other.name == pool.name:
            continue
        for mine, theirs in itertools.product(pool.cidrs, other.cidrs):
            if mine.overlaps(theirs):
                return (
                    f"pool {pool.name}: {mine} overlaps {theirs} of pool {other.name};"
                    " an address may belong to one pool only"
                )
    return None


def edges(cidr: Network) -> tuple[int, ...]:
    if cidr.num_addresses <= 2:
        return ()
    return (first(cidr), last(cidr)) if cidr.version == 4 else (first(cidr),)


def first(network: Network) -> int:
    return int(network.network_address)


def last(network: Network) -> int:
    return int(network.broadcast_address)


def span(network: Network) -> Range:
    return first(network), last(network)


def _covers(network: Network, address: int) -> bool:
    return network.version == family_of(address) and first(network) <= address <= last(network)


def _inside(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and (
        first(outer) <= first(inner) and last(inner) <= last(outer)
    )


def _network(name: str, text: str) -> Network:
    try:
        network = ip_network(text)
    except ValueError as error:
        try:
            meant = ip_network(text, strict=False)
        except (AddressValueError, NetmaskValueError, ValueError):
            raise PoolError(f"pool {name}: {text!r} is not a CIDR: {error}") from None
        raise PoolError(f"pool {name}: {text} has host bits set; did you mean {meant}?") from None
    if network.version == 6 and first(network) < V6_FROM:
        raise PoolError(f"pool {name}: {network} reaches into ::/96; take it from fc00::/7")
    return network


def _check_sizes(name: str, cidrs: tuple[Network, ...], v4: int, v6: int) -> None:
    for family, key, length in (
        (Family.V4, "block_size", v4),
        (Family.V6, "block_size_v6", v6),
    ):
        if not _SMALLEST[family] <= length <= family.bits:
            raise PoolError(
                f"pool {name}: {key} {length} is not in {_SMALLEST[family]}..{family.bits};"
                f" it is a prefix length, {family.bits - 6} for blocks of 64"
            )
        for cidr in cidrs:
            if cidr.version == family and cidr.prefixlen > length:
                raise PoolError(
                    f"pool {name}: a block of /{length} is larger than CIDR {cidr};"
                    f" raise {key} to {cidr.prefixlen} or more"
                )


def _refuse_overlap(name: str, networks: tuple[Network, ...]) -> None:
    ordered = sorted(networks, key=lambda network: (network.version, first(network)))
    for before, after in itertools.pairwise(ordered):
        if before.overlaps(after):
            raise PoolError(f"pool {name}: CIDRs {before} and {after} overlap; keep the wider one")
