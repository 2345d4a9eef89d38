"""Reading what nodes and identityd publish, in the formats that other clusters write too.

    cilium/state/identities/v1/id/<N>         canonical labels
    cilium/state/ip/v1/default/<ip>           JSON: IP, HostIP, ID, K8sNamespace, K8sPodName, ...
    cilium/state/nodes/v1/<cluster>/<node>    JSON: IPAddresses, ...

Fields that are not used are passed over, whatever they hold. All raise `Invalid`.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import TypeVar

import msgspec
from msgspec import field

from identity.keys import ID_PREFIX, IP_PREFIX, NODES_PREFIX
from identity.labels import Invalid as InvalidLabels
from identity.labels import Labels
from identity.numbers import FIRST_ALLOCATED, FIRST_LOCAL, NumericIdentity
from services.policyd.addresses import Announcement
from services.runtime.errors import Invalid

T = TypeVar("T")

_NODE_ADDRESS_TYPES = frozenset({"InternalIP", "ExternalIP", "CiliumInternalIP"})


class _IpEntry(msgspec.Struct, frozen=True):
    id: int = field(name="ID")
    host_ip: str = field(name="HostIP", default="")
    namespace: str = field(name="K8sNamespace", default="")
    name: str = field(name="K8sPodName", default="")


class _NodeAddress(msgspec.Struct, frozen=True):
    type: str = field(name="Type", default="")
    ip: str = field(name="IP", default="")


class _NodeEntry(msgspec.Struct, frozen=True):
    addresses: tuple[_NodeAddress, ...] = field(name="IPAddresses", default=())


def identity_of(key: str) -> NumericIdentity:
    text = key.removeprefix(ID_PREFIX)
    if not (text.isascii() and text.isdecimal()):
        raise Invalid("its key does not end in a number")
    number = int(text)
    if not FIRST_ALLOCATED <= number < FIRST_LOCAL:
        raise Invalid(f"{number} is not a number a cluster hands out")
    return NumericIdentity(number)


def labels_of(value: bytes) -> Labels:
    try:
        return Labels.from_canonical(value.decode())
    except (InvalidLabels, UnicodeDecodeError) as error:
        raise Invalid(str(error)) from error


def ip_of(key: str) -> str:
    ip = key.removeprefix(IP_PREFIX)
    try:
        canonical = str(ip_address(ip))
    except ValueError as error:
        raise Invalid(f"its key does not end in an address: {error}") from error
    if canonical != ip:
        raise Invalid(f"its key spells {canonical} as {ip}")
    return ip


def announcement_of(value: bytes) -> Announcement:
    entry = _decode(value, _IpEntry)
    return Announcement(NumericIdentity(entry.id), entry.host_ip, entry.namespace, entry.name)


def node_of(key: str) -> str:
    _cluster, slash, node = key.removeprefix(NODES_PREFIX).partition("/")
    if not slash or not node:
        raise Invalid("its key is not <cluster>/<node>")
    return node


def node_ips_of(value: bytes) -> tuple[str, ...]:
    entry = _decode(value, _NodeEntry)
    found = {a.ip for a in entry.addresses if a.type in _NODE_ADDRESS_TYPES and a.ip}
    return tuple(sorted(found))


def _decode(value: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(value, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Invalid(str(error)) from error
