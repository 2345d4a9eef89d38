"""`tessera policy eval`, `explain`, `diff`, `matrix` and `lint`: policies judged without a server.

cases.json --one case at a time--> evaluate --> one line of JSON each, or a row per subject
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import Output
from services.cli.output import Format, note, write_table

if TYPE_CHECKING:
    from services.policy.cases import Case, CaseResult


def eval_cases(
    file: Annotated[
        list[str],
        typer.Option("-f", "--file", help="Cases as JSON, or - ; repeatable.", metavar="PATH"),
    ],
    *,
    output: Output = Format.TABLE,
) -> None:
    """Judge recorded or made-up cases: who may reach whom under which policies."""
    from services.policy.evaluate import evaluate

    results = (evaluate(case) for case in _cases(file))
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


def _cases(paths: list[str]) -> Iterator[Case]:
    import msgspec

    from services.cli import manifests
    from services.policy.cases import Case, CaseFile
    from services.runtime.errors import Invalid

    for one in manifests.read(paths):
        try:
            several = msgspec.json.decode(one.text, type=CaseFile).cases
            for raw in (one.text,) if several is None else several:
                yield msgspec.json.decode(raw, type=Case)
        except msgspec.DecodeError as fault:
            raise Invalid(f"{one.source} holds no cases: {fault}") from fault
