"""Selector groups: what a peer chooses, under an id made from its canonical text.

    peer --definition--> GroupDef --GroupTable.acquire--> members, kept current by the deltas
                                                          of the selector index and the prefixes

Texts: a label selector as it is, `entity(world)`, `cidr(10.0.0.0/8 except 10.1.0.0/16)`,
`address(10.0.0.0/8)` where endpoints and nodes with such addresses belong to it too, and
`any address(10.0.0.0/8)` where one address is enough (residents.py).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, TypeVar, assert_never

from pyroaring import BitMap

from identity.index import SelectorIndex
from identity.labels import CLUSTER_KEY, K8S, RESERVED
from identity.numbers import NumericIdentity
from identity.selector import Operator, Requirement, Selector
from services.policy.clauses import GroupId
from services.policy.fqdn import label_of
from services.policy.model import (
    CidrPeer,
    EndpointPeer,
    EntityPeer,
    FqdnPeer,
    NamedPeer,
    NodePeer,
    ResolvedPeer,
)
from services.policy.prefixes import Network, PrefixTable, covering, remaining
from services.policy.residents import ByAddress, Residents

_WORLD: Final = ("world", "world-ipv4", "world-ipv6")
_NODES: Final = ("host", "remote-node")
_CLUSTER: Final = (
    "host",
    "remote-node",
    "init",
    "ingress",
    "health",
    "unmanaged",
    "kube-apiserver",
)


@dataclass(frozen=True, slots=True)
class GroupDef:
    """The union of selectors and of the identities of prefixes.

    by_address: which endpoints and nodes count by their addresses, too. Prefixes are of one family.
    """

    id: GroupId
    text: str
    selectors: tuple[Selector, ...] = ()
    networks: tuple[Network, ...] = ()
    by_address: ByAddress = ByAddress.NONE

    @property
    def version(self) -> int:
        return self.networks[0].version


def definition(
    peer: ResolvedPeer, cluster: str, by_address: ByAddress = ByAddress.NONE
) -> GroupDef | None:
    """None for entity none, which chooses nobody. Entity all is no group but any peer."""
    match peer:
        case EndpointPeer(selector):
            return _defined(str(selector), selectors=(selector,))
        case EntityPeer(name):
            selectors = _entity(name, cluster)
            return _defined(f"entity({name})", selectors=selectors) if selectors else None
        case CidrPeer(prefix, excepts):
            without = f" except {','.join(excepts)}" if excepts else ""
            networks = remaining(peer)
            kind = by_address.value or "cidr"
            text = f"{kind}({prefix}{without})"
            return GroupDef(group_id(text), text, (), networks, by_address) if networks else None
        case FqdnPeer(pattern):
            source, key, _ = label_of(pattern)
            learnt = Selector((Requirement(source, key, Operator.EXISTS),))
            return _defined(f"fqdn({pattern})", selectors=(learnt,))
        case NodePeer(selector):
            nodes = tuple(selector.and_(*_reserved(name).requirements) for name in _NODES)
            return _defined(f"node({selector})", selectors=nodes)
        case NamedPeer(text):
            return _defined(text)
        case _:
            assert_never(peer)


def _defined(text: str, selectors: tuple[Selector, ...] = ()) -> GroupDef:
    return GroupDef(group_id(text), text, selectors)


@lru_cache(maxsize=1 << 14)
def group_id(text: str) -> GroupId:
    """The first 8 bytes of the text's SHA-256, big endian; never 0."""
    return GroupId(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") or 1)


def _entity(name: str, cluster: str) -> tuple[Selector, ...]:
    match name:
        case "none":
            return ()
        case "world":
            return tuple(map(_reserved, _WORLD))
        case "cluster":
            own = Selector((Requirement(K8S, CLUSTER_KEY, Operator.IN, (cluster,)),))
            return (*map(_reserved, _CLUSTER), own)
        case _:
            return (_reserved(name),)


def _reserved(name: str) -> Selector:
    return Selector((Requirement(RESERVED, name, Operator.EXISTS),))


@dataclass(slots=True)
class Delta:
    """The net change of one group's members."""

    added: BitMap = field(default_factory=BitMap)
    removed: BitMap = field(default_factory=BitMap)

    def note(self, added: BitMap, removed: BitMap) -> None:
        """What comes and goes again within one change cancels out."""
        came, went = self.added, self.removed
        self.added = (came - removed) | (added - went)
        self.removed = (went - added) | (removed - came)


@dataclass(slots=True)
class _Group:
    definition: GroupDef
    members: BitMap
    users: int = 0


_NOBODY: Final = BitMap()

K = TypeVar("K")


class GroupTable:
    """Groups in use, counted. `deltas` gathers changes of members until it is taken."""

    def __init__(self, index: SelectorIndex, prefixes: PrefixTable) -> None:
        self._index = index
        self._prefixes = prefixes
        self._residents = Residents()
        self._groups: dict[GroupId, _Group] = {}
        self._by_selector: defaultdict[Selector, set[GroupId]] = defaultdict(set)
        self._by_network: defaultdict[Network, set[GroupId]] = defaultdict(set)
        self._deltas: defaultdict[GroupId, Delta] = defaultdict(Delta)

    def __contains__(self, group: GroupId) -> bool:
        return group in self._groups

    def definition(self, group: GroupId) -> GroupDef:
        return self._groups[group].definition

    def members(self, group: GroupId) -> BitMap:
        """Live; read, never change. Raises KeyError for an unknown group."""
        return self._groups[group].members

    def acquire(self, wanted: GroupDef) -> bool:
        """True when the group is new."""
        known = self._groups.get(wanted.id)
        if known is not None:
            known.users += 1
            return False
        chosen = [self._index.add_selector(selector) for selector in wanted.selectors]
        members = chosen[0].copy() if len(chosen) == 1 else BitMap.union(_NOBODY, *chosen)
        for selector in wanted.selectors:
            self._by_selector[selector].add(wanted.id)
        for network in wanted.networks:
            members |= self._prefixes.within(network)
            self._by_network[network].add(wanted.id)
        if wanted.by_address is not ByAddress.NONE:
            self._residents.follow(wanted.id, wanted.networks)
            members |= self._residents.chosen(wanted.id, wanted.version, wanted.by_address)
        self._groups[wanted.id] = _Group(wanted, members, users=1)
        return True

    def release(self, group: GroupId) -> bool:
        """True when that was its last user: the group is gone."""
        held = self._groups[group]
        held.users -= 1
        if held.users:
            return False
        del self._groups[group]
        self._deltas.pop(group, None)
        for selector in held.definition.selectors:
            self._index.remove_selector(selector)
            _forget(self._by_selector, selector, group)
        for network in held.definition.networks:
            _forget(self._by_network, network, group)
        self._residents.forget(group)
        return True

    def selectors_changed(
        self, added: Mapping[Selector, BitMap], removed: Mapping[Selector, BitMap]
    ) -> None:
        """The index changed the members of these selectors."""
        for selector in added.keys() | removed.keys():
            for group in self._by_selector.get(selector, ()):
                came, went = added.get(selector, _NOBODY), removed.get(selector, _NOBODY)
                self._change(self._groups[group], came, went)

    def prefixes_added(self, fresh: Mapping[Network, NumericIdentity]) -> None:
        for network, number in fresh.items():
            self._prefix_changed(network, BitMap([number]), _NOBODY)

    def prefixes_removed(self, gone: Mapping[Network, NumericIdentity]) -> None:
        for network, number in gone.items():
            self._prefix_changed(network, _NOBODY, BitMap([number]))

    def address_added(self, network: Network, number: NumericIdentity) -> None:
        touched = self._residents.add(network, number, self._by_address_around(network))
        self._reside(touched, number, network.version)

    def address_removed(self, network: Network, number: NumericIdentity) -> None:
        touched = self._residents.remove(network, number, self._by_address_around(network))
        self._reside(touched, number, network.version)

    def addresses_inside(self, group: GroupId, number: NumericIdentity) -> tuple[int, int]:
        """Of a group by address: how many of its addresses lie inside, and how many it has."""
        return self._residents.divided(group, number, self._groups[group].definition.version)

    def _by_address_around(self, network: Network) -> list[GroupId]:
        around = (group.definition for group in self._around(network))
        return [each.id for each in around if each.by_address is not ByAddress.NONE]

    def _reside(self, touched: Iterable[GroupId], number: NumericIdentity, version: int) -> None:
        alone = BitMap([number])
        for group in map(self._groups.__getitem__, touched):
            wanted = group.definition
            if wanted.version != version:
                continue
            chosen = self._residents.chooses(wanted.id, number, version, wanted.by_address)
            self._change(group, *((alone, _NOBODY) if chosen else (_NOBODY, alone)))

    def take_deltas(self) -> dict[GroupId, Delta]:
        if not self._deltas:
            return {}
        taken = {group: d for group, d in self._deltas.items() if d.added or d.removed}
        self._deltas.clear()
        return taken

    def _prefix_changed(self, network: Network, added: BitMap, removed: BitMap) -> None:
        for group in self._around(network):
            self._change(group, added, removed)

    def _around(self, network: Network) -> Iterator[_Group]:
        if not self._by_network:
            return
        for around in covering(network):
            for group in self._by_network.get(around, ()):
                yield self._groups[group]

    def _change(self, group: _Group, came: BitMap, went: BitMap) -> None:
        selectors = group.definition.selectors
        if len(selectors) > 1:
            # An identity may be in several selectors of the union, and leave only one.
            now = BitMap.union(*(self._index.members(selector) for selector in selectors))
            came, went = came & now, went - now
        came, went = came - group.members, went & group.members
        if came or went:
            group.members |= came
            group.members -= went
            self._deltas[group.definition.id].note(came, went)


def _forget(held: defaultdict[K, set[GroupId]], at: K, group: GroupId) -> None:
    held[at].discard(group)
    if not held[at]:
        del held[at]
