"""Manifests to policies: YAML or JSON text in, policies and problems out; never an exception."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from services.policy.clauses import PolicyRef
from services.policy.model import Policy


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding. An error refuses its document; a warning does not. Line and column from 1."""

    severity: Literal["error", "warning"]
    ref: PolicyRef | None
    path: str
    line: int
    column: int
    message: str
    source: str


@dataclass(frozen=True, slots=True)
class ParsedPolicy:
    """`manifest_text`: the document exactly as written; parsing it again yields the same policy.

    Give the namespace of the policy as default_namespace then: the text may name none.
    """

    policy: Policy
    manifest_text: str


@dataclass(frozen=True, slots=True)
class Parsed:
    policies: tuple[ParsedPolicy, ...]
    problems: tuple[Problem, ...]

    @property
    def refused(self) -> bool:
        return any(problem.severity == "error" for problem in self.problems)


def parse(text: bytes, source: str, default_namespace: str) -> Parsed:
    """Every document of `text`. A document with an error yields problems and no policy."""
    raise NotImplementedError
