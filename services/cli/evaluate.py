"""`tessera policy eval`: recorded or made-up cases, judged without a server.

cases.json --one case at a time--> evaluate --> one line of JSON each, or a row per subject
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import Output, examples
from services.cli.output import Format, note, write_table

if TYPE_CHECKING:
    from services.policy.cases import Case, CaseResult
    from services.policy.features import Dialect


class Reading(StrEnum):
    """`--dialect`: auto, or the value of a services.policy.features.Dialect."""

    AUTO = "auto"
    TESSERA = "tessera"
    CILIUM_1_17 = "cilium-1.17"


# Recorded cases come in files of many thousands.
MAX_CASES_BYTES = 64 << 20


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


EXAMPLES = examples("tessera policy eval -f cases.json -o json")
