"""Bodies of the REST interface, as Python sees them; their JSON Schemas are made from these."""

from __future__ import annotations

from msgspec import Struct, field


class Ref(Struct, frozen=True, forbid_unknown_fields=True):
    """`namespace` is empty for what has none."""

    kind: str
    name: str
    namespace: str = ""


class Refs(Struct, frozen=True, forbid_unknown_fields=True):
    refs: tuple[Ref, ...]


class Identity(Struct, frozen=True):
    """`scope`: reserved, well-known, cluster or local. `nodes`: those that use it."""

    id: int
    labels: tuple[str, ...]
    nodes: tuple[str, ...]
    scope: str


class Identities(Struct, frozen=True):
    """`next`: give it as `after` to go on; 0 at the end."""

    identities: tuple[Identity, ...]
    next: int = 0


class PolicyProblem(Struct, frozen=True):
    """`severity`: error or warning. `line` and `column` count from 1."""

    severity: str
    message: str
    source: str = ""
    line: int = 0
    column: int = 0
    path: str = ""
    policy: Ref | None = None


class AppliedPolicy(Struct, frozen=True):
    """`action`: created, configured, unchanged or deleted."""

    kind: str
    namespace: str
    name: str
    action: str


class Applied(Struct, frozen=True):
    """`revision`: at which all of it is stored; 0 for a dry run and for nothing to do."""

    revision: int
    policies: tuple[AppliedPolicy, ...]
    problems: tuple[PolicyProblem, ...] = ()


class Deleted(Struct, frozen=True):
    revision: int
    policies: tuple[AppliedPolicy, ...]
    not_found: tuple[Ref, ...] = ()


class StoredPolicy(Struct, frozen=True):
    """`state`: enforced, `not enforced yet: ...` or `broken: ...`. `selects`: identities chosen."""

    kind: str
    namespace: str
    name: str
    manifest: str
    revision: int
    author: str
    applied_at: str
    state: str
    selects: int


class StoredPolicies(Struct, frozen=True):
    policies: tuple[StoredPolicy, ...]
    revision: int


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


class Pool(Struct, frozen=True):
    name: str
    cidrs: tuple[str, ...]
    block_size: int
    capacity: int
    used: int


class Pools(Struct, frozen=True):
    pools: tuple[Pool, ...]


class Block(Struct, frozen=True):
    cidr: str
    pool: str
    node: str
    used: int
    size: int


class Blocks(Struct, frozen=True):
    blocks: tuple[Block, ...]


class Owner(Struct, frozen=True):
    namespace: str
    name: str
    interface: str
    uid: str


class Address(Struct, frozen=True):
    ip: str
    pool: str
    block: str
    node: str
    owner: Owner


class Addresses(Struct, frozen=True):
    addresses: tuple[Address, ...]


class Problem(Struct, frozen=True):
    """RFC 9457, application/problem+json."""

    title: str
    status: int
    detail: str


class Refused(Struct, frozen=True):
    """A Problem that also says what is wrong with which document."""

    title: str
    status: int
    detail: str
    problems: tuple[PolicyProblem, ...]
    revision: int = 0
    policies: tuple[AppliedPolicy, ...] = field(default=())
