"""`tessera policy eval`, `explain`, `diff`, `matrix` and `lint`: policies judged without a server.

cases.json --one case at a time--> evaluate --> one line of JSON each, or a row per subject
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from enum import StrEnum
from itertools import product
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import Output, examples
from services.cli.output import Format, note, say, write_json, write_table

if TYPE_CHECKING:
    from services.policy.cases import Case, CaseResult
    from services.policy.diff import Change, Difference
    from services.policy.explain import Reason
    from services.policy.features import Dialect
    from services.policy.model import Policy
    from services.policy.parse import Problem
    from services.policy.stage import Stage


class Reading(StrEnum):
    """`--dialect`: auto, or the value of a services.policy.features.Dialect."""

    AUTO = "auto"
    TESSERA = "tessera"
    CILIUM_1_17 = "cilium-1.17"


# Recorded cases come in files of many thousands.
MAX_CASES_BYTES = 64 << 20

_PolicyFiles = Annotated[
    list[str],
    typer.Option(
        "-f", "--file", help="Policies: file, directory or - ; repeatable.", metavar="PATH"
    ),
]
_EndpointsFile = Annotated[
    str, typer.Option("--endpoints", help="Endpoints and namespaces, YAML or JSON.", metavar="FILE")
]
_AskedPorts = Annotated[
    list[str],
    typer.Option("--port", help="8080/TCP, 53/UDP, 8/ICMP; repeatable.", metavar="PORT"),
]


def eval_cases(
    file: Annotated[
        list[str],
        typer.Option("-f", "--file", help="Cases as JSON, or - ; repeatable.", metavar="PATH"),
    ],
    *,
    dialect: Annotated[
        Reading,
        typer.Option(
            help="Whose reading of manifests: auto is cilium-1.17 for what was recorded with it.",
        ),
    ] = Reading.AUTO,
    output: Output = Format.TABLE,
) -> None:
    """Judge recorded or made-up cases.

    Who may reach whom under which policies; one JSON object per line with -o json.
    """
    broken: list[str] = []
    results = _noting(_results(file, dialect), broken)
    if output is Format.JSON:
        _write_results(results)
    else:
        rows = [row for result in results for row in _rows(result)]
        head = (
            "CASE",
            "SUBJECT",
            "INGRESS",
            "EGRESS",
            "ALLOW",
            "REDIRECT",
            "AUTH",
            "DENY",
            "ERROR",
        )
        write_table(head, rows, "no case")
    for fault in broken:
        note(fault)
    if broken:
        raise typer.Exit(1)


def _noting(results: Iterable[CaseResult], broken: list[str]) -> Iterator[CaseResult]:
    for result in results:
        if result.error is not None:
            broken.append(result.error)
        yield result


def _results(file: list[str], reading: Reading) -> Iterator[CaseResult]:
    """A case that cannot be judged does not keep the others from it."""
    from services.policy.cases import CaseResult
    from services.policy.evaluate import evaluate
    from services.runtime.errors import Invalid

    for case, dialect in _cases(file, reading):
        try:
            yield evaluate(case, dialect)
        except Invalid as fault:
            yield CaseResult(case.name, (), (), str(fault))


def _write_results(results: Iterator[CaseResult]) -> None:
    import msgspec

    separator = b'{"cases":[\n'
    for result in results:
        sys.stdout.buffer.write(separator + msgspec.json.encode(result))
        separator = b",\n"
    sys.stdout.buffer.write(b'{"cases":[]}\n' if separator != b",\n" else b"\n]}\n")
    sys.stdout.buffer.flush()


def _rows(result: CaseResult) -> Iterator[tuple[str, ...]]:
    for number, policy in enumerate(result.policies):
        if policy.error is not None:
            note(f"{result.name}: policies[{number}]: {policy.error}")
    for subject in result.subjects:
        said = [verdict.partition(":")[0] for verdict in subject.verdicts]
        counts = (str(said.count(word)) for word in ("allow", "redirect", "auth", "deny"))
        sides = (
            "enforced" if enforced else "open"
            for enforced in (subject.ingress_enforced, subject.egress_enforced)
        )
        yield (result.name, str(subject.id), *sides, *counts, subject.error or "")


def _cases(paths: list[str], reading: Reading) -> Iterator[tuple[Case, Dialect]]:
    import msgspec

    from services.cli import manifests
    from services.policy.cases import Case, CaseFile, dialect_of
    from services.policy.features import Dialect
    from services.runtime.errors import Invalid

    for one in manifests.read(paths, MAX_CASES_BYTES):
        try:
            held = msgspec.json.decode(one.text, type=CaseFile)
            for raw in (one.text,) if held.cases is None else held.cases:
                case = msgspec.json.decode(raw, type=Case)
                auto = reading is Reading.AUTO
                yield case, dialect_of(case, held.format) if auto else Dialect(reading.value)
        except msgspec.DecodeError as fault:
            raise Invalid(f"{one.source} holds no cases: {fault}") from fault


# ------------------------------------------------------------------ policies and endpoints


def explain(
    source: Annotated[
        str, typer.Argument(help="namespace/name, world, host or an address.", metavar="FROM")
    ],
    target: Annotated[str, typer.Argument(help="The same.", metavar="TO")],
    port: Annotated[str, typer.Argument(help="8080/TCP, 53/UDP or 8/ICMP.", metavar="PORT")],
    *,
    file: _PolicyFiles,
    endpoints: _EndpointsFile,
    output: Output = Format.TABLE,
) -> None:
    """Say why a connection passes or not.

    Both ends, the clause that decided, and the nearest miss.
    """
    from services.policy.stage import Ports

    stage = _stage(file, endpoints)
    reasons = stage.explain(source, target, Ports.parse(port))
    verdict = stage.verdict(source, target, Ports.parse(port))
    if output is Format.JSON:
        body = {"verdict": verdict, "ends": [_reason_json(reason) for reason in reasons]}
        write_json(json.dumps(body).encode())
        return
    say(f"{source} -> {target} {port}: {verdict}")
    for reason in reasons:
        asked = reason.asked
        who = target if asked.direction.name == "INGRESS" else source
        say(f"  {asked.direction.name.lower()} of {who}: {reason.words}")
        for miss in reason.misses:
            say(f"    nearly: {miss.lacks} ({miss.source})")


def _reason_json(reason: Reason) -> dict[str, object]:
    from services.policy.evaluate import word_of

    return {
        "direction": reason.asked.direction.name.lower(),
        "verdict": word_of(reason.answer),
        "reason": reason.words,
        "rules": [
            {
                "kind": rule.policy.kind,
                "namespace": rule.policy.namespace,
                "name": rule.policy.name,
                "rule": rule.rule_index,
                "clause": rule.clause,
                "line": rule.line,
            }
            for rule in reason.deciders
        ],
        "policies": [str(policy) for policy in reason.policies],
        "misses": [{"lacks": miss.lacks, "rule": str(miss.source)} for miss in reason.misses],
    }


def matrix(
    file: _PolicyFiles,
    endpoints: _EndpointsFile,
    port: _AskedPorts,
    *,
    output: Output = Format.TABLE,
) -> None:
    """Show who may talk to whom.

    Rows are sources, columns targets.
    """
    from services.policy.stage import Ports

    stage = _stage(file, endpoints)
    names = stage.endpoints
    tables = {
        asked: {a: {b: stage.verdict(a, b, asked) for b in names} for a in (*names, "world")}
        for asked in map(Ports.parse, port)
    }
    if output is Format.JSON:
        write_json(json.dumps({str(asked): table for asked, table in tables.items()}).encode())
        return
    for asked, table in tables.items():
        rows = [(a, *row.values()) for a, row in table.items()]
        write_table((str(asked), *names), rows, "no endpoint")


def diff(
    old: Annotated[list[str], typer.Option("--old", help="Policies before.", metavar="PATH")],
    new: Annotated[list[str], typer.Option("--new", help="Policies after.", metavar="PATH")],
    endpoints: _EndpointsFile,
    port: _AskedPorts,
    *,
    output: Output = Format.TABLE,
) -> None:
    """Show what a change of policies denies or allows."""
    from services.policy.diff import Connection, difference
    from services.policy.stage import Ports

    before, after = _stage(old, endpoints), _stage(new, endpoints)
    ends = (*after.endpoints, "world")
    asked = [
        Connection(a, b, ports)
        for a, b, ports in product(ends, ends, map(Ports.parse, port))
        if (a, b) != ("world", "world")
    ]
    found = difference(before, after, asked)
    if output is Format.JSON:
        write_json(json.dumps(_difference_json(found)).encode())
        return
    for kind, changes in _kinds(found):
        for change in changes:
            at = change.connection
            turn = f"({change.before} -> {change.after})"
            say(f"{kind}  {at.source} -> {at.target} {at.ports}  {turn}")
    say(f"{found.unchanged} of {len(asked)} connections unchanged")


def _kinds(found: Difference) -> Iterable[tuple[str, tuple[Change, ...]]]:
    return ("denied", found.denied), ("allowed", found.allowed), ("changed", found.changed)


def _difference_json(found: Difference) -> dict[str, object]:
    body: dict[str, object] = {"unchanged": found.unchanged}
    for kind, changes in _kinds(found):
        body[kind] = [
            {
                "source": change.connection.source,
                "target": change.connection.target,
                "port": str(change.connection.ports),
                "before": change.before,
                "after": change.after,
            }
            for change in changes
        ]
    return body


def lint(
    file: _PolicyFiles,
    endpoints: Annotated[
        str,
        typer.Option("--endpoints", help="To see which policies select nothing.", metavar="FILE"),
    ] = "",
) -> None:
    """Name mistakes and what is likely not meant; exit 1 if any."""
    policies, problems = _read(file)
    findings = [_problem_words(problem) for problem in problems]
    if endpoints:
        findings += list(_on_stage(policies, endpoints).findings())
    for finding in findings:
        say(finding)
    if findings:
        raise typer.Exit(1)


def _problem_words(problem: Problem) -> str:
    where = f"{problem.source}:{problem.line}:{problem.column}"
    return f"{where}: {problem.severity}: {problem.message}"


def _read(paths: list[str]) -> tuple[list[Policy], list[Problem]]:
    from services.cli import manifests
    from services.policy.features import Features
    from services.policy.parse import parse

    parsed = [parse(one.text, one.source, "default", Features.ALL) for one in manifests.read(paths)]
    policies = [held.policy for each in parsed for held in each.policies]
    return policies, [problem for each in parsed for problem in each.problems]


def _stage(paths: list[str], endpoints: str) -> Stage:
    policies, problems = _read(paths)
    errors = [problem for problem in problems if problem.severity == "error"]
    for problem in errors:
        note(_problem_words(problem))
    if errors:
        raise typer.Exit(1)
    return _on_stage(policies, endpoints)


def _on_stage(policies: list[Policy], endpoints: str) -> Stage:
    from services.cli import manifests
    from services.policy.stage import Stage, read_endpoints

    (given,) = manifests.read([endpoints])
    return Stage(read_endpoints(given.text, given.source), policies)


_ASKED = "-f policies/ --endpoints endpoints.yaml"

EXAMPLES = {
    eval_cases: examples("tessera policy eval -f cases.json -o json"),
    explain: examples(f"tessera policy explain shop/web shop/db 5432/TCP {_ASKED}"),
    matrix: examples(f"tessera policy matrix {_ASKED} --port 5432/TCP"),
    diff: examples(
        "tessera policy diff --old main/ --new branch/ --endpoints endpoints.yaml --port 5432/TCP"
    ),
    lint: examples("tessera policy lint -f policies/"),
}
