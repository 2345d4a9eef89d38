"""CIDRs that policies name, their node-local identities, and who has which address.

An identity number comes from a hash of its prefix, the next free number on a collision, so that it
does not depend on what was named before, short of collisions.
"""

from __future__ import annotations

import hashlib
import ipaddress
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from pyroaring import BitMap

from identity.labels import CIDR, RESERVED, Label, Labels
from identity.numbers import FIRST_LOCAL, WORLD, WORLD_IPV4, WORLD_IPV6, NumericIdentity
from services.policy.model import CidrPeer

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_LOCAL_NUMBERS: Final = 1 << 24
_WORLD_LABEL: Final = Label(RESERVED, "world", "")
_WORLDS: Final = {4: BitMap([WORLD, WORLD_IPV4]), 6: BitMap([WORLD, WORLD_IPV6])}

_NOBODY: Final = BitMap()

# Orders the prefixes within a prefix next to each other.
_Key = tuple[int, int, int]


def remaining(peer: CidrPeer) -> tuple[Network, ...]:
    """The fewest prefixes that cover `peer.prefix` without its exceptions, in address order."""
    holes = [ipaddress.ip_network(text) for text in peer.excepts]
    return tuple(_left(ipaddress.ip_network(peer.prefix), holes))


def _left(network: Network, holes: Sequence[Network]) -> Iterator[Network]:
    if not holes:
        yield network
    elif not any(hole.prefixlen <= network.prefixlen for hole in holes):
        for half in network.subnets():
            yield from _left(half, [hole for hole in holes if hole.overlaps(half)])


def labels_of(network: Network) -> Labels:
    return Labels([Label(CIDR, str(network), ""), _WORLD_LABEL])


class Holders:
    """Which identities hold which prefixes, found by a prefix around them."""

    def __init__(self) -> None:
        self._held: dict[Network, BitMap] = {}
        self._order: list[_Key] = []

    def add(self, network: Network, number: NumericIdentity) -> bool:
        """False when it held the prefix before."""
        held = self._held.get(network)
        if held is None:
            held = self._held[network] = BitMap()
            insort(self._order, _key(network))
        elif number in held:
            return False
        held.add(number)
        return True

    def discard(self, network: Network, number: NumericIdentity) -> None:
        held = self._held.get(network)
        if held is None:
            return
        held.discard(number)
        if not held:
            del self._held[network]
            del self._order[bisect_left(self._order, _key(network))]

    def at(self, network: Network) -> BitMap:
        """Who holds exactly this prefix; not to be changed."""
        return self._held.get(network, _NOBODY)

    def within(self, network: Network) -> BitMap:
        return BitMap.union(_NOBODY, *self.each_within(network))

    def each_within(self, network: Network) -> Iterator[BitMap]:
        """Who holds each prefix within; not to be changed."""
        low = _key(network)
        last = low[1] + network.num_addresses - 1
        for at in range(bisect_left(self._order, low), len(self._order)):
            version, address, length = self._order[at]
            if version != low[0] or address > last:
                break
            yield self._held[_network(version, address, length)]


class PrefixTable:
    """Prefixes in use, counted by how often policies name them.

    `place` adds identities of prefixes that come from elsewhere, of names that were looked up, say.
    """

    def __init__(self) -> None:
        self._users: Counter[Network] = Counter()
        self._identities: dict[Network, NumericIdentity] = {}
        self._taken: dict[NumericIdentity, Network] = {}
        self._placed: dict[NumericIdentity, Network] = {}
        self._holders = Holders()

    def acquire(self, networks: Iterable[Network]) -> dict[Network, NumericIdentity]:
        """The prefixes that are new by this, with their identities."""
        fresh = {}
        for network in networks:
            self._users[network] += 1
            if network not in self._identities:
                number = self._number(str(network))
                self._identities[network] = number
                self._taken[number] = network
                self._holders.add(network, number)
                fresh[network] = number
        return fresh

    def release(self, networks: Iterable[Network]) -> dict[Network, NumericIdentity]:
        """The prefixes that nobody names any more, with the identities they had."""
        gone = {}
        for network in networks:
            self._users[network] -= 1
            if not self._users[network]:
                del self._users[network]
                number = self._identities.pop(network)
                del self._taken[number]
                self._holders.discard(network, number)
                gone[network] = number
        return gone

    def place(self, number: NumericIdentity, network: Network) -> None:
        self._placed[number] = network
        self._holders.add(network, number)

    def unplace(self, number: NumericIdentity) -> Network | None:
        network = self._placed.pop(number, None)
        if network is not None:
            self._holders.discard(network, number)
        return network

    def within(self, network: Network) -> BitMap:
        """Identities chosen by the prefix; of the whole address space, world too."""
        found = self._holders.within(network)
        return found | _WORLDS[network.version] if network.prefixlen == 0 else found

    def holds(self, number: NumericIdentity) -> bool:
        return number in self._taken

    def items(self) -> Mapping[str, NumericIdentity]:
        return {str(network): number for network, number in self._identities.items()}

    def _number(self, prefix: str) -> NumericIdentity:
        local = int.from_bytes(hashlib.sha256(prefix.encode()).digest()[:3], "big")
        while not local or not self._is_free(NumericIdentity(FIRST_LOCAL | local)):
            local = (local + 1) % _LOCAL_NUMBERS
        return NumericIdentity(FIRST_LOCAL | local)

    def _is_free(self, number: NumericIdentity) -> bool:
        return number not in self._taken and number not in self._placed


def covering(network: Network) -> Iterator[Network]:
    """The prefix itself and every prefix around it."""
    for length in range(network.prefixlen + 1):
        yield network.supernet(new_prefix=length)


def _key(network: Network) -> _Key:
    return network.version, int(network.network_address), network.prefixlen


def _network(version: int, address: int, length: int) -> Network:
    if version == 4:
        return ipaddress.IPv4Network((address, length))
    return ipaddress.IPv6Network((address, length))
