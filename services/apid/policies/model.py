"""Policies, as REST takes and shows them."""

from __future__ import annotations

from msgspec import Struct

from services.apid.rest.errors import Problem


class Ref(Struct, frozen=True, forbid_unknown_fields=True):
    """`namespace` is empty for what has none."""

    kind: str
    name: str
    namespace: str = ""


class Refs(Struct, frozen=True, forbid_unknown_fields=True):
    refs: tuple[Ref, ...]


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
    """`state`: `enforced`, `enforced on ...`, `not enforced yet: ...` or `broken: ...`. `selects`:
    identities chosen."""

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
    next: str = ""


class OnNode(Struct, frozen=True):
    """`stage`: accepted, resolved, sent, realised or failed. `realised`: the revision in the node's
    kernel. `reason`: why it failed or waits. `identities`: of those selected, how many it has."""

    node: str
    stage: str
    connected: bool
    realised: int
    reason: str
    identities: int


class PolicyStatus(Struct, frozen=True):
    """`nodes`: those with endpoints that the policy selects. `realised`: on how many it is."""

    kind: str
    namespace: str
    name: str
    revision: int
    author: str
    applied_at: str
    state: str
    selects: int
    realised: int
    nodes: tuple[OnNode, ...]


class PolicyChange(Struct, frozen=True):
    """`action`: created, configured or deleted. `diff`: unified, against the change before it."""

    kind: str
    namespace: str
    name: str
    revision: int
    action: str
    author: str
    changed_at: str
    manifest: str
    diff: str


class PolicyHistory(Struct, frozen=True):
    """Newest first."""

    changes: tuple[PolicyChange, ...]


class Refused(Problem, frozen=True):
    """A Problem that also says what is wrong with which document, when documents are at fault."""

    problems: tuple[PolicyProblem, ...] = ()
