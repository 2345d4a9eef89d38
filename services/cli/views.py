"""The parts of server answers that tables show. Fields a newer server adds are passed over."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from msgspec import Struct

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


class Identity(Struct, frozen=True):
    id: int
    labels: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    scope: str = ""

    def row(self) -> tuple[str, ...]:
        return (str(self.id), self.scope, ",".join(self.nodes) or "-", ",".join(self.labels))


class Identities(Struct, frozen=True):
    identities: tuple[Identity, ...]
    next: int = 0


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


class PolicyName(Struct, frozen=True):
    kind: str
    name: str
    namespace: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}".replace(" /", " ")


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
