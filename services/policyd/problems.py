"""Findings about manifests, as messages."""

from __future__ import annotations

from tessera_wire.policy.v1 import policy_pb2

from services.policy.advice import Advice
from services.policy.parse import Problem
from services.wire.convert import ref_to_wire


def problem_to_wire(problem: Problem) -> policy_pb2.PolicyProblem:
    return policy_pb2.PolicyProblem(
        ref=None if problem.ref is None else ref_to_wire(problem.ref),
        severity=problem.severity,
        path=problem.path,
        line=problem.line,
        column=problem.column,
        message=problem.message,
        source=problem.source,
    )


def advice_to_wire(advice: Advice, source: str) -> policy_pb2.PolicyProblem:
    return policy_pb2.PolicyProblem(
        ref=ref_to_wire(advice.ref),
        severity="warning",
        line=advice.position.line,
        column=advice.position.column,
        message=advice.message,
        source=source,
    )
