"""Endpoints and nodes by their addresses, for CIDRs that are matched by address.

An identity is let in or kept out as a whole, and its endpoints may have addresses on both sides of
a prefix. So that no policy gives more than it says, one that allows chooses an identity when all of
its addresses lie inside, one that denies as soon as one does; each family of addresses for itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from enum import Enum

from pyroaring import BitMap

from identity.numbers import HOST, NumericIdentity
from services.policy.clauses import GroupId
from services.policy.prefixes import Holders, Network


class ByAddress(Enum):
    """Which identities prefixes choose by their addresses."""

    NONE = ""
    ALL_INSIDE = "address"
    ANY_INSIDE = "any address"


class Residents:
    """Counts addresses inside of groups; costs what an identity's groups are, not its addresses."""

    def __init__(self) -> None:
        self._at = Holders()
        self._total: Counter[tuple[int, NumericIdentity]] = Counter()
        self._inside: dict[GroupId, Counter[NumericIdentity]] = {}
        self._groups: defaultdict[NumericIdentity, set[GroupId]] = defaultdict(set)

    def follow(self, group: GroupId, networks: Iterable[Network]) -> None:
        """From now on the group is counted."""
        inside: Counter[NumericIdentity] = Counter()
        for network in networks:
            for held in self._at.each_within(network):
                inside.update(map(NumericIdentity, held))
        self._inside[group] = inside
        for number in inside:
            self._groups[number].add(group)

    def forget(self, group: GroupId) -> None:
        for number in self._inside.pop(group, ()):
            self._drop(number, group)

    def add(
        self, network: Network, number: NumericIdentity, around: Iterable[GroupId]
    ) -> frozenset[GroupId]:
        """`around`: the groups that hold the address. Returns those that may choose anew."""
        if not self._at.add(network, number):
            return frozenset()
        self._total[network.version, number] += 1
        for group in around:
            self._inside[group][number] += 1
            self._groups[number].add(group)
        return frozenset(self._groups.get(number, ()))

    def remove(
        self, network: Network, number: NumericIdentity, around: Iterable[GroupId]
    ) -> frozenset[GroupId]:
        """As `add`."""
        if number not in self._at.at(network):
            return frozenset()
        self._at.discard(network, number)
        self._total[network.version, number] -= 1
        if not self._total[network.version, number]:
            del self._total[network.version, number]
        touched = frozenset(self._groups.get(number, ()))
        for group in around:
            inside = self._inside[group]
            inside[number] -= 1
            if not inside[number]:
                del inside[number]
                self._drop(number, group)
        return touched

    def chooses(
        self, group: GroupId, number: NumericIdentity, version: int, how: ByAddress
    ) -> bool:
        inside = self._inside[group][number]
        # A node's own host is one identity on all nodes: a deny of some is not a deny of all.
        every = how is ByAddress.ALL_INSIDE or number == HOST
        needed = self._total[version, number] if every else 1
        return 0 < needed <= inside

    def divided(self, group: GroupId, number: NumericIdentity, version: int) -> tuple[int, int]:
        """How many of its addresses lie inside, and how many it has."""
        return self._inside.get(group, Counter())[number], self._total[version, number]

    def chosen(self, group: GroupId, version: int, how: ByAddress) -> BitMap:
        return BitMap(n for n in self._inside[group] if self.chooses(group, n, version, how))

    def _drop(self, number: NumericIdentity, group: GroupId) -> None:
        held = self._groups[number]
        held.discard(group)
        if not held:
            del self._groups[number]
