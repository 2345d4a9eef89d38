"""CiliumCIDRGroup: prefixes under a name and labels, which clauses refer to.

    CiliumCIDRGroup document --read--> CidrGroup --Resolver.set_cidr_groups--> the CIDRs of clauses
    fromCIDRSet: [{cidrGroupRef | cidrGroupSelector, except}] -----------------┘ that refer to it

A group that does not exist chooses nobody, never everybody.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from identity.labels import K8S, Invalid, Label, Labels
from services.policy.model import CidrGroupPeer, CidrPeer
from services.policy.peers import contains, read_network
from services.policy.reader import Cursor, Fields
from services.policy.tree import Mapping as Tree
from services.policy.tree import Node, Scalar

KIND = "CiliumCIDRGroup"
API_VERSIONS = ("cilium.io/v2", "cilium.io/v2alpha1")
_METADATA = ("name", "labels", "annotations")


@dataclass(frozen=True, slots=True)
class CidrGroup:
    """prefixes: canonical, each once."""

    name: str
    labels: Labels
    prefixes: tuple[str, ...]


def is_cidr_group(node: Node) -> bool:
    kind = node.entries.get("kind") if isinstance(node, Tree) else None
    return kind is not None and isinstance(kind.value, Scalar) and kind.value.value == KIND


def read_cidr_group(root: Cursor) -> CidrGroup | None:
    """None: it has an error, which is on the report."""
    document = root.fields("apiVersion", "kind", "metadata", "spec")
    if document is None:
        return None
    version = document.text("apiVersion")
    if version is not None and version not in API_VERSIONS:
        root.error(f"apiVersion {version!r} of {KIND} is not known; write {API_VERSIONS[0]}")
    metadata_at = document.require("metadata", "give the group a metadata.name")
    metadata = metadata_at.fields(*_METADATA) if metadata_at is not None else None
    name_at = metadata.require("name", "clauses refer to it") if metadata is not None else None
    name = name_at.text() if name_at is not None else None
    spec_at = document.require("spec", "list the prefixes in externalCIDRs")
    spec = spec_at.fields("externalCIDRs") if spec_at is not None else None
    if metadata is None or spec is None or not name:
        return None
    found = (read_network(at) for at in spec.items("externalCIDRs") or ())
    prefixes = tuple(dict.fromkeys(str(network) for network in found if network is not None))
    return CidrGroup(name, _labels(metadata), prefixes)


def _labels(metadata: Fields) -> Labels:
    at = metadata.get("labels")
    fields = at.fields() if at is not None else None
    pairs = [(key, value_at.text()) for key, value_at in fields or ()]
    try:
        return Labels([Label(K8S, key, value) for key, value in pairs if value is not None])
    except Invalid as fault:
        metadata.at.error(str(fault))
        return Labels.EMPTY


def expanded(peer: CidrGroupPeer, groups: Mapping[str, CidrGroup]) -> Iterator[CidrPeer]:
    """The prefixes of the groups that are meant, each without the exceptions inside of it."""
    for group in _meant(peer, groups):
        for text in group.prefixes:
            prefix = ipaddress.ip_network(text)
            holes = list(map(ipaddress.ip_network, peer.excepts))
            if not any(contains(hole, prefix) for hole in holes):
                yield CidrPeer(text, tuple(str(h) for h in holes if contains(prefix, h)))


def _meant(peer: CidrGroupPeer, groups: Mapping[str, CidrGroup]) -> Iterable[CidrGroup]:
    if peer.selector is None:
        known = groups.get(peer.name)
        return () if known is None else (known,)
    selector = peer.selector
    return [group for _, group in sorted(groups.items()) if selector.matches(group.labels)]
