"""The services and the nodes, as REST shows them."""

from __future__ import annotations

from msgspec import Struct


class NodeState(Struct, frozen=True):
    """`reason`: why the node has not realised the revision; empty when it has."""

    node: str
    connected: bool
    realised: int
    reason: str


class Realised(Struct, frozen=True):
    done: bool
    revision: int
    nodes: tuple[NodeState, ...]


class Nodes(Struct, frozen=True):
    nodes: tuple[NodeState, ...]
    revision: int
    next: str = ""


class Counts(Struct, frozen=True):
    revision: int
    policies: int
    identities: int
    addresses: int
    groups: int


class Status(Struct, frozen=True):
    """`services`: "ok", or what is wrong, by name. `policy` is null while policyd is away."""

    services: dict[str, str]
    policy: Counts | None
    nodes: tuple[NodeState, ...]
