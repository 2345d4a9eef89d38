"""`tessera policy matrix` and `lint`: policies and endpoints on paper, without a server.

policies, endpoints file --> Stage --> who may talk to whom, what is likely not meant
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import Output, examples
from services.cli.output import Format, note, say, write_json, write_table

if TYPE_CHECKING:
    from services.policy.parse import Parsed, Problem
    from services.policy.stage import Stage

PolicyFiles = Annotated[
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


def matrix(
    file: PolicyFiles,
    endpoints: _EndpointsFile,
    port: _AskedPorts,
    *,
    output: Output = Format.TABLE,
) -> None:
    """Show who may talk to whom.

    Rows are sources, columns targets.
    """
    from services.policy.questions import Ports

    stage = stage_of(file, endpoints)
    names, verdict = stage.endpoints, stage.questions.verdict
    tables = {
        asked: {a: {b: verdict(a, b, asked) for b in names} for a in (*names, "world")}
        for asked in map(Ports.parse, port)
    }
    if output is Format.JSON:
        write_json(json.dumps({str(asked): table for asked, table in tables.items()}).encode())
        return
    for asked, table in tables.items():
        rows = [(a, *row.values()) for a, row in table.items()]
        write_table((str(asked), *names), rows, "no endpoint")


def lint(
    file: PolicyFiles,
    endpoints: Annotated[
        str,
        typer.Option("--endpoints", help="To see which policies select nothing.", metavar="FILE"),
    ] = "",
) -> None:
    """Name mistakes and what is likely not meant; exit 1 if any."""
    parsed = _read(file)
    findings = [_problem_words(problem) for one in parsed for problem in one.problems]
    if endpoints:
        findings += list(_on_stage(parsed, endpoints).findings())
    for finding in findings:
        say(finding)
    if findings:
        raise typer.Exit(1)


def _problem_words(problem: Problem) -> str:
    where = f"{problem.source}:{problem.line}:{problem.column}"
    return f"{where}: {problem.severity}: {problem.message}"


def _read(paths: list[str]) -> list[Parsed]:
    from services.cli import manifests
    from services.policy.features import Features
    from services.policy.parse import parse

    return [parse(one.text, one.source, "default", Features.ALL) for one in manifests.read(paths)]


def stage_of(paths: list[str], endpoints: str) -> Stage:
    parsed = _read(paths)
    found = (problem for one in parsed for problem in one.problems)
    errors = [problem for problem in found if problem.severity == "error"]
    for problem in errors:
        note(_problem_words(problem))
    if errors:
        raise typer.Exit(1)
    return _on_stage(parsed, endpoints)


def _on_stage(parsed: list[Parsed], endpoints: str) -> Stage:
    from services.cli import manifests
    from services.policy.stage import Stage, read_endpoints

    (given,) = manifests.read([endpoints])
    policies = [held.policy for each in parsed for held in each.policies]
    groups = [group for each in parsed for group in each.cidr_groups]
    return Stage(read_endpoints(given.text, given.source), policies, groups)


EXAMPLES: dict[Callable[..., None], str] = {
    matrix: examples(
        "tessera policy matrix -f policies/ --endpoints endpoints.yaml --port 5432/TCP"
    ),
    lint: examples("tessera policy lint -f policies/"),
}
