"""The addresses that nodes have announced, by address, by identity and by endpoint; and the nodes.

Read from the public keys, so entries of other writers are here too. What cannot be read is passed
over: it was told where it was written, or belongs to somebody else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from msgspec import UNSET

from identity import keys
from identity.numbers import NumericIdentity
from services.identityd.published import AddressValue, NodeValue

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Address:
    """`namespace` and `name` are empty when the announcement names no endpoint; `node` when its
    host's address is no registered node's."""

    ip: str
    identity: NumericIdentity
    host_ip: str
    namespace: str
    name: str
    node: str


class Announced:
    def __init__(self) -> None:
        self._values: dict[str, AddressValue] = {}
        self._of_identity: defaultdict[NumericIdentity, set[str]] = defaultdict(set)
        self._of_endpoint: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        self._addresses_of_node: dict[str, tuple[str, ...]] = {}
        self._node_at: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._values)

    @property
    def nodes(self) -> list[str]:
        return sorted(self._addresses_of_node)

    def __iter__(self) -> Iterator[str]:
        """The addresses, in no order."""
        return iter(self._values)

    def has_node(self, node: str) -> bool:
        return node in self._addresses_of_node

    def at(self, ip: str) -> Address | None:
        value = self._values.get(ip)
        return None if value is None else self._address(value)

    def count(self, number: NumericIdentity) -> int:
        """Addresses of the identity."""
        return len(self._of_identity.get(number, ()))

    def of_identity(self, number: NumericIdentity) -> list[Address]:
        return self._sorted(self._of_identity.get(number, ()))

    def of_endpoint(self, namespace: str, name: str) -> list[Address]:
        return self._sorted(self._of_endpoint.get((namespace, name), ()))

    def put(self, key: str, value: bytes) -> None:
        """An address's key or a node's."""
        if key.startswith(keys.IP_PREFIX):
            self._put_address(key.removeprefix(keys.IP_PREFIX), value)
        else:
            self._put_node(_node_in(key), value)

    def drop(self, key: str) -> None:
        if key.startswith(keys.IP_PREFIX):
            self._drop_address(key.removeprefix(keys.IP_PREFIX))
        else:
            self._drop_node(_node_in(key))

    def _put_address(self, ip: str, value: bytes) -> None:
        self._drop_address(ip)
        try:
            read = msgspec.json.decode(value, type=AddressValue)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        self._values[ip] = read
        self._of_identity[NumericIdentity(read.number)].add(ip)
        self._of_endpoint[_endpoint(read)].add(ip)

    def _drop_address(self, ip: str) -> None:
        old = self._values.pop(ip, None)
        if old is not None:
            _discard(self._of_identity, NumericIdentity(old.number), ip)
            _discard(self._of_endpoint, _endpoint(old), ip)

    def _put_node(self, node: str, value: bytes) -> None:
        self._drop_node(node)
        try:
            read = msgspec.json.decode(value, type=NodeValue)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        ips = self._addresses_of_node[node] = tuple(each.ip for each in read.addresses)
        self._node_at |= dict.fromkeys(ips, node)

    def _drop_node(self, node: str) -> None:
        for ip in self._addresses_of_node.pop(node, ()):
            if self._node_at.get(ip) == node:
                del self._node_at[ip]

    def _sorted(self, ips: Iterable[str]) -> list[Address]:
        return [self._address(self._values[ip]) for ip in sorted(ips)]

    def _address(self, value: AddressValue) -> Address:
        namespace, name = _endpoint(value)
        node = self._node_at.get(value.host_ip, "")
        number = NumericIdentity(value.number)
        return Address(value.ip, number, value.host_ip, namespace, name, node)


def _endpoint(value: AddressValue) -> tuple[str, str]:
    named = value.namespace is not UNSET and value.name is not UNSET
    return (str(value.namespace), str(value.name)) if named else ("", "")


def _node_in(key: str) -> str:
    return key.removeprefix(keys.NODES_PREFIX).partition("/")[2]


def _discard(index: defaultdict[K, set[str]], key: K, ip: str) -> None:
    index[key].discard(ip)
    if not index[key]:
        del index[key]
