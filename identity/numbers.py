"""Numeric identities: ranges, scopes, reserved numbers (Cilium ClusterMesh bit layout).

    31      24 23      16 15             0
    +---------+----------+---------------+
    |  scope  | cluster  | local number  |
    +---------+----------+---------------+

Scope 0 crosses the wire: numbers below 256 mean the same everywhere, the rest are allocated once
per cluster. Scope 1 (prefixes, names) and 2 (nodes) are chosen by each node for itself. A mesh of
more than 255 clusters moves one bit: 9 for the cluster, 15 for the local number; all clusters of a
mesh must agree, and it can be chosen for a new cluster only.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NewType

from identity.labels import CIDR, FQDN, RESERVED, Invalid, Label, Labels

NumericIdentity = NewType("NumericIdentity", int)

UNKNOWN: Final = NumericIdentity(0)
HOST: Final = NumericIdentity(1)
WORLD: Final = NumericIdentity(2)
UNMANAGED: Final = NumericIdentity(3)
HEALTH: Final = NumericIdentity(4)
INIT: Final = NumericIdentity(5)
REMOTE_NODE: Final = NumericIdentity(6)
KUBE_APISERVER: Final = NumericIdentity(7)
INGRESS: Final = NumericIdentity(8)
WORLD_IPV4: Final = NumericIdentity(9)
WORLD_IPV6: Final = NumericIdentity(10)
ENCRYPTED_OVERLAY: Final = NumericIdentity(11)

FIRST_WELL_KNOWN: Final = 100
FIRST_FIXED: Final = 128
FIRST_ALLOCATED: Final = 256
FIRST_LOCAL: Final = 1 << 24

# How many clusters a mesh may have -> bits of the local number.
LOCAL_BITS: Final[Mapping[int, int]] = {255: 16, 511: 15}
DEFAULT_MAX_CLUSTERS: Final = 255

_SCOPE_SHIFT = 24
_LOCAL_SOURCES: Final = frozenset({CIDR, FQDN, RESERVED})

_RESERVED_NAMES: Final[Mapping[NumericIdentity, str]] = {
    UNKNOWN: "unknown",
    HOST: "host",
    WORLD: "world",
    UNMANAGED: "unmanaged",
    HEALTH: "health",
    INIT: "init",
    REMOTE_NODE: "remote-node",
    KUBE_APISERVER: "kube-apiserver",
    INGRESS: "ingress",
    WORLD_IPV4: "world-ipv4",
    WORLD_IPV6: "world-ipv6",
    ENCRYPTED_OVERLAY: "overlay-to-encrypt",
}

# Each number has a twin, eight above, whose labels also carry the namespace's own name.
_WELL_KNOWN_NAMES: Final = (
    "etcd-operator",
    "cilium-kvstore",
    "kube-dns",
    "eks-kube-dns",
    "coredns",
    "cilium-operator",
    "eks-coredns",
    "cilium-etcd-operator",
)


class Scope(StrEnum):
    RESERVED = "reserved"
    WELL_KNOWN = "well-known"
    FIXED = "fixed"
    CLUSTER = "cluster"
    LOCAL = "local"
    REMOTE_NODE = "remote-node"


def scope_of(number: int) -> Scope:
    """Raises `Invalid` for what is no identity: negative, too wide, or of an unassigned scope."""
    match number >> _SCOPE_SHIFT:
        case 0:
            return _global_scope(number)
        case 1:
            return Scope.LOCAL
        case 2:
            return Scope.REMOTE_NODE
        case _:
            raise Invalid(
                f"{number} is no identity: the highest byte of one is 0 (cluster-wide),"
                " 1 (local to a node) or 2 (remote node)"
            )


def _global_scope(number: int) -> Scope:
    if number >= FIRST_ALLOCATED:
        return Scope.CLUSTER
    if number >= FIRST_FIXED:
        return Scope.FIXED
    if FIRST_WELL_KNOWN <= number < FIRST_WELL_KNOWN + 2 * len(_WELL_KNOWN_NAMES):
        return Scope.WELL_KNOWN
    return Scope.RESERVED


def scope_for(labels: Labels) -> Scope:
    """Which scope the identity of `labels` belongs to."""
    if reserved_number(labels) is not None:
        return Scope.RESERVED
    if labels.get("remote-node", RESERVED) is not None:
        return Scope.REMOTE_NODE
    if labels.sources() <= _LOCAL_SOURCES:
        return Scope.LOCAL
    return Scope.CLUSTER


def cluster_of(number: int, max_clusters: int = DEFAULT_MAX_CLUSTERS) -> int:
    """The cluster that allocated a number of scope CLUSTER; 0 for a cluster without an id."""
    return (number >> LOCAL_BITS[max_clusters]) & max_clusters


def allocatable(cluster_id: int, max_clusters: int = DEFAULT_MAX_CLUSTERS) -> range:
    """The numbers that a cluster hands out. `max_clusters`: 255 or 511."""
    if max_clusters not in LOCAL_BITS:
        raise Invalid(
            f"a mesh of {max_clusters} clusters has no number layout; choose 255 (65,536 numbers"
            " for each cluster) or 511 (32,768)"
        )
    if not 0 <= cluster_id <= max_clusters:
        more = "; with max_clusters = 511 up to 511" if max_clusters == DEFAULT_MAX_CLUSTERS else ""
        raise Invalid(f"cluster id {cluster_id} is not within 0..{max_clusters}{more}")
    bits = LOCAL_BITS[max_clusters]
    first = cluster_id << bits
    return range(max(first, FIRST_ALLOCATED), first + (1 << bits))


def name_of(number: int) -> str | None:
    """The name of a reserved or well-known number."""
    if number < FIRST_WELL_KNOWN:
        return _RESERVED_NAMES.get(NumericIdentity(number))
    twin = number - FIRST_WELL_KNOWN
    if twin < 2 * len(_WELL_KNOWN_NAMES):
        return _WELL_KNOWN_NAMES[twin % len(_WELL_KNOWN_NAMES)]
    return None


def _labels_of(number: NumericIdentity, name: str) -> Labels:
    labels = Labels([Label(RESERVED, name, "")])
    if number == KUBE_APISERVER:
        return labels.with_label(Label(RESERVED, "remote-node", ""))
    return labels


_RESERVED_LABELS: Final[Mapping[NumericIdentity, Labels]] = MappingProxyType(
    {number: _labels_of(number, name) for number, name in _RESERVED_NAMES.items() if number}
)
_RESERVED_BY_LABELS: Final = {labels: number for number, labels in _RESERVED_LABELS.items()} | {
    Labels([Label(RESERVED, "kube-apiserver", "")]): KUBE_APISERVER
}

_MOST_RESERVED_LABELS: Final = max(map(len, _RESERVED_BY_LABELS))


def reserved_labels() -> Mapping[NumericIdentity, Labels]:
    """Labels of the reserved identities. UNKNOWN has none: no selector chooses it."""
    return _RESERVED_LABELS


def reserved_number(labels: Labels) -> NumericIdentity | None:
    if len(labels) > _MOST_RESERVED_LABELS:
        return None
    return _RESERVED_BY_LABELS.get(labels)
