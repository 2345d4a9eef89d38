"""A block: the run of addresses that one node draws from.

Addresses are plain integers, of both families: below 2**32 it is IPv4. No pool reaches into the
IPv6 addresses that small (::/96), so a number has one meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

V6_FROM = 1 << 32


class Family(IntEnum):
    V4 = 4
    V6 = 6

    @property
    def bits(self) -> int:
        return 32 if self is Family.V4 else 128

    def __str__(self) -> str:
        return f"IPv{self.value}"


def family_of(address: int) -> Family:
    return Family.V4 if address < V6_FROM else Family.V6


def address_text(address: int) -> str:
    return str(IPv4Address(address) if address < V6_FROM else IPv6Address(address))


def parse_address(text: str) -> int:
    """Raises ValueError."""
    parsed = ip_address(text)
    if parsed.version == 6 and int(parsed) < V6_FROM:
        raise ValueError(f"{text} lies in ::/96, which no pool covers")
    return int(parsed)


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """`size` is the prefix length; `base` the first address."""

    base: int
    size: int

    @property
    def family(self) -> Family:
        return family_of(self.base)

    @property
    def count(self) -> int:
        return 1 << (self.family.bits - self.size)

    @property
    def last(self) -> int:
        return self.base + self.count - 1

    def __contains__(self, address: int) -> bool:
        return self.base <= address <= self.last

    def __str__(self) -> str:
        return f"{address_text(self.base)}/{self.size}"

    def addresses(self) -> Iterator[int]:
        return iter(range(self.base, self.last + 1))


# Every address of a block names it: read back after a start, one text in 64 is new.
@lru_cache(maxsize=1 << 14)
def parse_block(text: str) -> Block:
    """Raises ValueError."""
    network = ip_network(text)
    return Block(int(network.network_address), network.prefixlen)
