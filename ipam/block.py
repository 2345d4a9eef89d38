"""A block: the run of addresses that one node draws from.

Addresses are plain integers here, sets of addresses within a block are integers used as bit
masks: bit i stands for the block's i-th address.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

BITS = 32


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """`size` is the prefix length; `base` the first address."""

    base: int
    size: int

    @property
    def count(self) -> int:
        return 1 << (BITS - self.size)

    @property
    def last(self) -> int:
        return self.base + self.count - 1

    @property
    def every(self) -> int:
        """The mask of all its addresses."""
        return (1 << self.count) - 1

    def __contains__(self, address: int) -> bool:
        return self.base <= address <= self.last

    def __str__(self) -> str:
        return f"{IPv4Address(self.base)}/{self.size}"

    def addresses(self) -> Iterator[int]:
        return iter(range(self.base, self.last + 1))

    def bit(self, address: int) -> int:
        return 1 << (address - self.base)

    def overlap(self, first: int, last: int) -> int:
        """The mask of the addresses that lie in first..last."""
        low, high = max(first, self.base), min(last, self.last)
        return 0 if low > high else ((1 << (high - low + 1)) - 1) << (low - self.base)


def parse_block(text: str) -> Block:
    network = IPv4Network(text)
    return Block(int(network.network_address), network.prefixlen)


def pick(mask: int, spread: int) -> int:
    """The index of the first set bit at or after `spread`, from the start again after the end.
    `mask` must not be empty."""
    rest = (mask >> spread << spread) or mask
    return (rest & -rest).bit_length() - 1
