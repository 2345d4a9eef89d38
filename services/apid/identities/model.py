"""Identities, as REST shows them."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class Identity(Struct, frozen=True):
    """`scope`: reserved, well-known, cluster or local. `nodes`: those that use it. `addresses`: how
    many are announced with it."""

    id: int
    labels: tuple[str, ...]
    nodes: tuple[str, ...]
    scope: str
    addresses: int


class Identities(Struct, frozen=True):
    """All pages of one list are of one `revision`. `next`: give it as `cursor` to go on; empty on
    the last page."""

    identities: tuple[Identity, ...]
    revision: int
    next: str = ""


class Endpoint(Struct, frozen=True):
    """One announced address. `namespace` and `name` are empty when it is no endpoint's, `node` when
    its host is no registered node."""

    ip: str
    identity: int
    namespace: str
    name: str
    node: str
    host_ip: str


class Endpoints(Struct, frozen=True):
    endpoints: tuple[Endpoint, ...]
    next: str = ""


class Reference(Struct, frozen=True):
    """`held`: the node keeps the identity alive; without it, it only announces addresses."""

    node: str
    held: bool
    endpoints: tuple[Endpoint, ...]


class References(Struct, frozen=True):
    id: int
    labels: tuple[str, ...]
    references: tuple[Reference, ...]


class Stats(Struct, frozen=True):
    """Numbers of this cluster. `unreferenced`: of the used, those waiting for their collection.

    Rates are of the last `window_s` seconds. `exhausted_in_s`: when the numbers run out if it goes
    on like that; null when they do not. `pressure`: none, high (80 % taken), critical (95 %).
    """

    cluster: str
    cluster_id: int
    revision: int
    total: int
    used: int
    quarantined: int
    free: int
    pressure: str
    unreferenced: int
    references: int
    addresses: int
    nodes: int
    namespaces: int
    window_s: float
    created_per_s: float
    collected_per_s: float
    exhausted_in_s: float | None


class ValueUsage(Struct, frozen=True):
    value: str
    identities: int


class KeyUsage(Struct, frozen=True):
    """How many identities carry the key, in how many `values`. As many values as identities: every
    workload gets an identity of its own for it."""

    key: str
    identities: int
    values: int
    commonest: tuple[ValueUsage, ...]


class NamespaceUsage(Struct, frozen=True):
    namespace: str
    identities: int


class Usage(Struct, frozen=True):
    """`keys`: most values first. `namespaces`: most identities first, the empty name for none."""

    keys: tuple[KeyUsage, ...]
    namespaces: tuple[NamespaceUsage, ...]
    next: str = ""


class Change(Struct, frozen=True):
    """What happened to one identity. `node`: of referenced and released."""

    id: int
    labels: tuple[str, ...]
    scope: str
    node: str = ""


class Told(Struct, frozen=True):
    """Everything up to `revision` has been told."""

    revision: int


class Reset(Struct, frozen=True):
    """What was told before is void: changes were forgotten meanwhile. The list follows."""

    reason: str


class WantedRules(Struct, frozen=True, forbid_unknown_fields=True):
    """Which labels make an identity. `label_filter` is added to the default: "!k8s:uid" ignores
    what begins with it, "k8s:app" allows it, and then only what is allowed counts.
    `policy_relevant`: only labels that some policy selects by. `namespace_quota`: identities of one
    namespace, 0 for no bound. `warn_values`: so many values of one key within a namespace are
    warned of."""

    label_filter: tuple[str, ...] = ()
    policy_relevant: bool = False
    namespace_quota: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 4096
    warn_values: Annotated[int, Meta(ge=2, le=2**32 - 1)] = 100


class Rules(Struct, frozen=True):
    """The label rules in force. `revision` 0: those of identityd's configuration. `relevant_keys`:
    with `policy_relevant`, the keys that count at present."""

    label_filter: tuple[str, ...]
    policy_relevant: bool
    namespace_quota: int
    warn_values: int
    revision: int
    relevant_keys: tuple[str, ...]
