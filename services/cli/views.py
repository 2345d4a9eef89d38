"""The parts of server answers that tables show. Fields a newer server adds are passed over."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from msgspec import Struct

from services.cli.output import lasting
from services.runtime.errors import Invalid

T = TypeVar("T")


def decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise Invalid(
            f"the server's answer is not what this client expects ({error}); "
            "do the versions match? see `tessera version`"
        ) from error


_NAMESPACE = "k8s:io.kubernetes.pod.namespace="
# On every identity of a cluster, and in the way of what tells them apart.
_CLUSTER = "k8s:io.cilium.k8s.policy.cluster="


def namespace_of(labels: tuple[str, ...]) -> str:
    found = (label.removeprefix(_NAMESPACE) for label in labels if label.startswith(_NAMESPACE))
    return next(found, "-")


def telling(labels: tuple[str, ...]) -> str:
    """The labels that a namespace column leaves to be said."""
    kept = (label for label in labels if not label.startswith((_NAMESPACE, _CLUSTER)))
    return ",".join(kept) or "-"


class Identity(Struct, frozen=True):
    id: int
    labels: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    scope: str = ""
    addresses: int = 0

    def row(self) -> tuple[str, ...]:
        namespace, counts = namespace_of(self.labels), (len(self.nodes), self.addresses)
        return (str(self.id), namespace, *map(str, counts), telling(self.labels))

    def lines(self) -> list[tuple[str, str]]:
        first, *rest = self.labels or ("-",)
        return [
            ("scope", self.scope),
            ("labels", first),
            *(("", label) for label in rest),
            ("nodes", ", ".join(self.nodes) or "-"),
            ("addresses", str(self.addresses)),
        ]


class Identities(Struct, frozen=True):
    identities: tuple[Identity, ...]


class PolicyName(Struct, frozen=True):
    kind: str
    name: str
    namespace: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}".replace(" /", " ")


class Announced(Struct, frozen=True):
    """An endpoint's address, as its node announced it."""

    ip: str
    identity: int = 0
    namespace: str = ""
    name: str = ""
    node: str = ""

    @property
    def ref(self) -> str:
        return f"{self.namespace}/{self.name}" if self.name else "-"


class Selected(Struct, frozen=True):
    """The policies about an identity, per direction."""

    identity: int
    ingress_enforced: bool = False
    egress_enforced: bool = False
    ingress: tuple[PolicyName, ...] = ()
    egress: tuple[PolicyName, ...] = ()

    def rows(self) -> list[tuple[str, str, str, str]]:
        directions = (
            ("ingress", self.ingress_enforced, self.ingress),
            ("egress", self.egress_enforced, self.egress),
        )
        return [
            (
                str(self.identity),
                direction,
                "yes" if enforced else "no, open",
                ", ".join(map(str, policies)) or "-",
            )
            for direction, enforced, policies in directions
        ]


class Whois(Struct, frozen=True):
    says: tuple[str, ...]
    identities: tuple[Identity, ...] = ()
    endpoints: tuple[Announced, ...] = ()
    more: bool = False
    policies: tuple[Selected, ...] = ()
    unknown: tuple[str, ...] = ()


class Reference(Struct, frozen=True):
    node: str
    held: bool = True
    endpoints: tuple[Announced, ...] = ()

    def rows(self) -> list[tuple[str, ...]]:
        holds = "yes" if self.held else "no"
        rows: list[tuple[str, ...]] = [
            (self.node, holds, one.ref, one.ip) for one in self.endpoints
        ]
        return rows or [(self.node, holds, "-", "-")]


class References(Struct, frozen=True):
    references: tuple[Reference, ...]


class IdentityStats(Struct, frozen=True):
    cluster: str
    total: int
    used: int
    quarantined: int
    free: int
    pressure: str = "none"
    unreferenced: int = 0
    references: int = 0
    addresses: int = 0
    nodes: int = 0
    namespaces: int = 0
    window_s: float = 0.0
    created_per_s: float = 0.0
    collected_per_s: float = 0.0
    exhausted_in_s: float | None = None

    @property
    def taken(self) -> float:
        return 1 - self.free / self.total

    def lines(self) -> list[tuple[str, str]]:
        window = f"over the last {lasting(self.window_s)}"
        forecast = "not in sight"
        if self.exhausted_in_s is not None:
            forecast = f"in {lasting(self.exhausted_in_s)}, if it goes on as {window}"
        return [
            ("used", f"{self.used} of {self.total}"),
            ("unreferenced", f"{self.unreferenced}  (of the used; collected after a grace)"),
            ("quarantined", f"{self.quarantined}  (collected; not given out again yet)"),
            ("free", f"{self.free}  ({self.free / self.total:.1%})"),
            ("created", f"{self.created_per_s:.2f}/s {window}"),
            ("collected", f"{self.collected_per_s:.2f}/s {window}"),
            ("exhausted", forecast),
            ("references", f"{self.references}  (nodes: {self.nodes})"),
            ("addresses", str(self.addresses)),
            ("namespaces", str(self.namespaces)),
        ]


class LabelRules(Struct, frozen=True):
    label_filter: tuple[str, ...] = ()
    policy_relevant: bool = False
    namespace_quota: int = 0
    warn_values: int = 0
    revision: int = 0
    relevant_keys: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        return f"revision {self.revision}" if self.revision else "of the configuration"

    def lines(self) -> list[tuple[str, str]]:
        first, *rest = self.label_filter or ("the default alone",)
        counting = "those that policies select by" if self.policy_relevant else "all that pass"
        lines = [
            ("filter", first),
            *(("", text) for text in rest),
            ("labels that count", counting),
            ("namespace quota", str(self.namespace_quota or "none")),
            ("warn at values", str(self.warn_values)),
        ]
        if self.policy_relevant:
            lines.append(("keys at present", ", ".join(self.relevant_keys) or "-"))
        return lines


class ValueUsage(Struct, frozen=True):
    value: str
    identities: int

    def row(self) -> tuple[str, ...]:
        return (self.value or '""', str(self.identities))


class KeyUsage(Struct, frozen=True):
    key: str
    identities: int
    values: int
    commonest: tuple[ValueUsage, ...] = ()

    def row(self) -> tuple[str, ...]:
        shown = ",".join(f"{value}={count}" for value, count in (v.row() for v in self.commonest))
        return (self.key, str(self.values), str(self.identities), shown)


class NamespaceUsage(Struct, frozen=True):
    namespace: str
    identities: int

    def row(self) -> tuple[str, ...]:
        return (self.namespace or "-", str(self.identities))


class IdentityUsage(Struct, frozen=True):
    keys: tuple[KeyUsage, ...]
    namespaces: tuple[NamespaceUsage, ...] = ()


class Said(Struct, frozen=True):
    """Of a problem, the words."""

    detail: str


class IdentityChange(Struct, frozen=True):
    id: int
    labels: tuple[str, ...] = ()
    node: str = ""

    def line(self, name: str) -> str:
        by = f"  by {self.node}" if self.node else ""
        return f"{name:<10} {self.id:<8} {namespace_of(self.labels):<12} {telling(self.labels)}{by}"


class Endpoint(Struct, frozen=True):
    id: int
    namespace: str
    name: str
    ip: str
    identity: int
    state: str = ""
    interface: str = ""
    labels: tuple[str, ...] = ()
    container: str = ""

    @property
    def ref(self) -> str:
        return f"{self.namespace}/{self.name}"

    def row(self) -> tuple[str, ...]:
        labels = ",".join(self.labels)
        return (str(self.id), self.ref, self.ip, str(self.identity), self.state, labels)


class NewEndpoint(Struct, frozen=True):
    id: int
    ip: str
    identity: int
    state: str = ""


class Endpoints(Struct, frozen=True):
    endpoints: tuple[Endpoint, ...]


class Problem(Struct, frozen=True):
    message: str
    severity: str = "error"
    path: str = ""
    line: int = 0
    column: int = 0
    source: str = ""

    def __str__(self) -> str:
        where = f"{self.source}:{self.line}:{self.column}: " if self.line else f"{self.source}: "
        path = f" ({self.path})" if self.path else ""
        kind = "" if self.severity == "error" else f"{self.severity}: "
        return f"{where}{kind}{self.message}{path}"


class AppliedPolicy(PolicyName, frozen=True):
    action: str = ""
    state: str = ""


class Applied(Struct, frozen=True):
    """`revision` 0: refused, or a dry run."""

    revision: int = 0
    policies: tuple[AppliedPolicy, ...] = ()
    problems: tuple[Problem, ...] = ()


class Deleted(Struct, frozen=True):
    revision: int = 0
    policies: tuple[AppliedPolicy, ...] = ()
    not_found: tuple[PolicyName, ...] = ()


class StoredPolicy(PolicyName, frozen=True):
    manifest: str = ""
    revision: int = 0
    author: str = ""
    applied_at: str = ""
    state: str = ""
    selects: int = 0

    def row(self) -> tuple[str, ...]:
        namespace, revision = self.namespace or "-", str(self.revision)
        return (self.kind, namespace, self.name, str(self.selects), revision, self.state)


class StoredPolicies(Struct, frozen=True):
    policies: tuple[StoredPolicy, ...]
    revision: int = 0


class NodeState(Struct, frozen=True):
    node: str
    connected: bool = False
    realised: int = 0
    reason: str = ""

    def row(self, revision: int) -> tuple[str, ...]:
        """Beside the newest revision."""
        behind = self.reason or ("-" if self.realised >= revision else f"of {revision}")
        return (self.node, "yes" if self.connected else "no", str(self.realised), behind)


class Nodes(Struct, frozen=True):
    nodes: tuple[NodeState, ...]
    revision: int


class Realised(Struct, frozen=True):
    done: bool
    revision: int = 0
    nodes: tuple[NodeState, ...] = ()


class OnNode(Struct, frozen=True):
    node: str
    stage: str
    connected: bool = False
    realised: int = 0
    reason: str = ""
    identities: int = 0

    def row(self) -> tuple[str, ...]:
        return (self.node, self.stage, str(self.realised), str(self.identities), self.reason or "-")


class PolicyStatus(PolicyName, frozen=True):
    revision: int = 0
    author: str = ""
    applied_at: str = ""
    state: str = ""
    selects: int = 0
    realised: int = 0
    nodes: tuple[OnNode, ...] = ()

    @property
    def done(self) -> bool:
        return self.realised == len(self.nodes)

    def line(self) -> str:
        by = f" by {self.author}" if self.author else ""
        return (
            f"{self}: revision {self.revision}{by}, {self.state}; selects {self.selects} identities"
            f", realised on {self.realised} of the {len(self.nodes)} nodes that have some"
        )


class PolicyChange(PolicyName, frozen=True):
    revision: int = 0
    action: str = ""
    author: str = ""
    changed_at: str = ""
    manifest: str = ""
    diff: str = ""

    def row(self) -> tuple[str, ...]:
        lines = self.diff.splitlines()[2:]
        added = sum(line.startswith("+") for line in lines)
        removed = sum(line.startswith("-") for line in lines)
        who, changed = self.author or "-", f"+{added} -{removed}"
        return (str(self.revision), self.changed_at, who, self.action, changed, str(self))


class PolicyHistory(Struct, frozen=True):
    changes: tuple[PolicyChange, ...]
