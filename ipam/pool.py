"""A pool: CIDRs cut into blocks of one size.

Network and broadcast address are lost once per CIDR, not once per block: only the blocks at the
CIDR's own edges carry them. CIDRs of /31 and /32 have no such edges (RFC 3021).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError

from ipam.block import BITS, Block

MIN_BLOCK_SIZE = 20  # a node that holds 4096 addresses starves the others
MAX_RESERVED = 256

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


class PoolError(ValueError):
    """What is wrong with a pool's definition, in words for the operator."""


@dataclass(frozen=True, slots=True)
class Pool:
    name: str
    cidrs: tuple[IPv4Network, ...]
    block_size: int
    reserved: tuple[IPv4Network, ...] = ()

    @property
    def capacity(self) -> int:
        """Addresses that can be handed out."""
        return sum(cidr.num_addresses for cidr in self.cidrs) - len(self._unusable())

    def cidr_of(self, address: int) -> IPv4Network | None:
        return next((c for c in self.cidrs if first(c) <= address <= last(c)), None)

    def block_of(self, address: int) -> Block | None:
        if self.cidr_of(address) is None:
            return None
        host_bits = BITS - self.block_size
        return Block(address >> host_bits << host_bits, self.block_size)

    def owns(self, block: Block) -> bool:
        return block.size == self.block_size and self.cidr_of(block.base) is not None

    def usable(self, block: Block) -> int:
        """Mask of the block's addresses that may be handed out."""
        cidr = self.cidr_of(block.base)
        if cidr is None:
            return 0
        lost = 0
        for edge in edges(cidr):
            lost |= block.overlap(edge, edge)
        for network in self.reserved:
            lost |= block.overlap(first(network), last(network))
        return block.every & ~lost

    def describe(self) -> str:
        return f"{self.name} ({', '.join(map(str, self.cidrs))})"

    def _unusable(self) -> set[int]:
        lost = {edge for cidr in self.cidrs for edge in edges(cidr)}
        for network in self.reserved:
            lost.update(range(first(network), last(network) + 1))
        return lost


def define(name: str, cidrs: Sequence[str], block_size: int, reserved: Sequence[str] = ()) -> Pool:
    """Raises `PoolError`."""
    if not _NAME.fullmatch(name):
        raise PoolError(f"pool {name!r}: a name is 1 to 63 of a-z, 0-9 and '-', no '-' at the ends")
    if not cidrs:
        raise PoolError(f"pool {name}: give at least one CIDR")
    if not MIN_BLOCK_SIZE <= block_size <= BITS:
        raise PoolError(
            f"pool {name}: block_size {block_size} is not in {MIN_BLOCK_SIZE}..{BITS};"
            " it is a prefix length, 26 for blocks of 64"
        )
    networks = tuple(_network(name, text) for text in cidrs)
    for network in networks:
        if network.prefixlen > block_size:
            raise PoolError(
                f"pool {name}: a block of /{block_size} is larger than CIDR {network};"
                f" raise block_size to {network.prefixlen} or more"
            )
    _refuse_overlap(name, networks)
    pool = Pool(name, networks, block_size, tuple(_network(name, text) for text in reserved))
    _check_reserved(pool)
    return pool


def overlap(pool: Pool, others: Iterable[Pool]) -> str | None:
    """What collides with another pool, in words; None when nothing does."""
    for other in others:
        for mine in pool.cidrs:
            for theirs in other.cidrs:
                if other.name != pool.name and mine.overlaps(theirs):
                    return (
                        f"pool {pool.name}: {mine} overlaps {theirs} of pool {other.name};"
                        " an address may belong to one pool only"
                    )
    return None


def edges(cidr: IPv4Network) -> tuple[int, ...]:
    return () if cidr.prefixlen >= BITS - 1 else (first(cidr), last(cidr))


def first(network: IPv4Network) -> int:
    return int(network.network_address)


def last(network: IPv4Network) -> int:
    return int(network.broadcast_address)


def _network(name: str, text: str) -> IPv4Network:
    try:
        return IPv4Network(text)
    except (AddressValueError, NetmaskValueError) as error:
        raise PoolError(f"pool {name}: {text!r} is not an IPv4 CIDR: {error}") from None
    except ValueError:
        meant = IPv4Network(text, strict=False)
        raise PoolError(f"pool {name}: {text} has host bits set; did you mean {meant}?") from None


def _refuse_overlap(name: str, networks: tuple[IPv4Network, ...]) -> None:
    ordered = sorted(networks)
    for before, after in itertools.pairwise(ordered):
        if before.overlaps(after):
            raise PoolError(f"pool {name}: CIDRs {before} and {after} overlap; keep the wider one")


def _check_reserved(pool: Pool) -> None:
    for network in pool.reserved:
        if network.num_addresses > MAX_RESERVED:
            raise PoolError(
                f"pool {pool.name}: reserved {network} is wider than {MAX_RESERVED} addresses;"
                " leave it out of the CIDRs instead"
            )
        if not any(network.subnet_of(cidr) for cidr in pool.cidrs):
            raise PoolError(f"pool {pool.name}: reserved {network} is outside the pool's CIDRs")
    if pool.capacity == 0:
        raise PoolError(f"pool {pool.name}: no address is left to hand out; widen a CIDR")


def address_text(address: int) -> str:
    return str(IPv4Address(address))
