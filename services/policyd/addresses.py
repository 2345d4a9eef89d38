"""Which address means which identity, and since when that may be said.

    announcements (endpoints) --- held until the identity is known ---+
    nodes (remote-node) ----------------------------------------------+--> rows by address
    prefixes (CIDRs that policies name) ------------------------------+

Pure. Writers touch addresses; `settle` compares what is to be shown of them with what was, and says
which identities have other addresses by that: CIDRs may be matched by them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import TypeVar

from identity.numbers import HOST, REMOTE_NODE, NumericIdentity
from services.policy.prefixes import Network

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Announcement:
    identity: NumericIdentity
    host_ip: str
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Row:
    """`cidr`: "10.0.0.1", or a prefix "10.0.0.0/8". `node`: its name, or its IP while unnamed."""

    cidr: str
    identity: NumericIdentity
    node: str = ""
    namespace: str = ""
    name: str = ""


@dataclass(slots=True)
class Settled:
    """`different`: addresses whose row came, went or differs. `came`, `went`: what endpoints and
    nodes are found at now, and no longer."""

    different: set[str] = field(default_factory=set)
    came: list[tuple[NumericIdentity, Network]] = field(default_factory=list)
    went: list[tuple[NumericIdentity, Network]] = field(default_factory=list)


class Addresses:
    def __init__(self, knows: Callable[[NumericIdentity], bool]) -> None:
        self._knows = knows
        self._announced: dict[str, Announcement] = {}
        self._by_identity: defaultdict[NumericIdentity, set[str]] = defaultdict(set)
        self._by_host: defaultdict[str, set[str]] = defaultdict(set)
        self._prefixes: dict[str, NumericIdentity] = {}
        self._node_ips: dict[str, tuple[str, ...]] = {}
        self._nodes_at: defaultdict[str, set[str]] = defaultdict(set)
        self._shown: dict[str, Row] = {}
        self._touched: set[str] = set()

    @property
    def rows(self) -> Mapping[str, Row]:
        """As of the last `settle`."""
        return self._shown

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset(self._node_ips)

    def has_node(self, node: str) -> bool:
        return node in self._node_ips

    def nodes_of(
        self, identities: Iterable[NumericIdentity]
    ) -> Mapping[str, frozenset[NumericIdentity]]:
        """The nodes that announce endpoints of them, each with those it has."""
        found: defaultdict[str, set[NumericIdentity]] = defaultdict(set)
        for identity in identities:
            for host in {self._announced[ip].host_ip for ip in self._by_identity.get(identity, ())}:
                found[self._node_at(host) or host].add(identity)
        return {node: frozenset(here) for node, here in found.items()}

    def identities_on(self, node: str) -> frozenset[NumericIdentity]:
        """Of the endpoints that the node announces."""
        hosts = self._node_ips.get(node, (node,))
        ips = (ip for host in hosts for ip in self._by_host.get(host, ()))
        return frozenset(self._announced[ip].identity for ip in ips)

    def announce(self, ip: str, announcement: Announcement) -> None:
        self.withdraw(ip)
        self._announced[ip] = announcement
        self._by_identity[announcement.identity].add(ip)
        self._by_host[announcement.host_ip].add(ip)

    def withdraw(self, ip: str) -> None:
        self._touched.add(ip)
        old = self._announced.pop(ip, None)
        if old is not None:
            _discard(self._by_identity, old.identity, ip)
            _discard(self._by_host, old.host_ip, ip)

    def set_prefixes(self, prefixes: Mapping[str, NumericIdentity]) -> None:
        self._prefixes.update(prefixes)
        self._touched.update(prefixes)

    def remove_prefixes(self, prefixes: Iterable[str]) -> None:
        for prefix in prefixes:
            self._prefixes.pop(prefix, None)
            self._touched.add(prefix)

    def set_node(self, node: str, ips: tuple[str, ...]) -> None:
        self.remove_node(node)
        self._node_ips[node] = ips
        for ip in ips:
            self._nodes_at[ip].add(node)
            self._touch_host(ip)

    def remove_node(self, node: str) -> None:
        for ip in self._node_ips.pop(node, ()):
            _discard(self._nodes_at, ip, node)
            self._touch_host(ip)

    def identities_changed(self, identities: Iterable[NumericIdentity]) -> None:
        """They came to be known, or are no longer."""
        for identity in identities:
            self._touched.update(self._by_identity.get(identity, ()))

    def settle(self) -> Settled:
        """What is different since the last call."""
        settled = Settled()
        for cidr in self._touched:
            row, was = self._row(cidr), self._shown.get(cidr)
            if row == was:
                continue
            settled.different.add(cidr)
            if row is None:
                del self._shown[cidr]
            else:
                self._shown[cidr] = row
            now, before = set(_residents(row)), set(_residents(was))
            settled.came += now - before
            settled.went += before - now
        self._touched.clear()
        return settled

    def _row(self, cidr: str) -> Row | None:
        node = self._node_at(cidr)
        if node is not None:
            return Row(cidr, REMOTE_NODE, node)
        found = self._announced.get(cidr)
        if found is not None:
            if not self._knows(found.identity):
                return None
            host = self._node_at(found.host_ip) or found.host_ip
            return Row(cidr, found.identity, host, found.namespace, found.name)
        identity = self._prefixes.get(cidr)
        return None if identity is None else Row(cidr, identity)

    def _node_at(self, ip: str) -> str | None:
        # Two names for one address: a node was renamed, and the old name's lease still runs.
        names = self._nodes_at.get(ip)
        return min(names) if names else None

    def _touch_host(self, ip: str) -> None:
        self._touched.add(ip)
        self._touched.update(self._by_host.get(ip, ()))


def _residents(row: Row | None) -> Iterator[tuple[NumericIdentity, Network]]:
    """Of an endpoint its identity; of a node that of nodes, its own and others'."""
    if row is None or "/" in row.cidr:
        return
    network = ip_network(row.cidr)
    yield row.identity, network
    if row.identity == REMOTE_NODE:
        yield HOST, network


def _discard(index: dict[K, set[str]], key: K, member: str) -> None:
    held = index.get(key)
    if held is not None:
        held.discard(member)
        if not held:
            del index[key]
