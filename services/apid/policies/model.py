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
    next: str = ""


class Refused(Problem, frozen=True):
    """A Problem that also says what is wrong with which document."""

    problems: tuple[PolicyProblem, ...]
