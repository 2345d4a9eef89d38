"""The demo's rows for people. Programs get them whole, with `-o json`."""

from __future__ import annotations

from services.cli.demo.evidence import Row
from services.cli.demo.run import Report
from services.cli.output import say, write_table

_HEAD = ("", "FROM", "TO", "PORT", "EXPECTED", "SEEN", "REASON", "RULE")


def show(report: Report) -> None:
    write_table(_HEAD, [_cells(row) for row in report.rows], "")
    for remark in report.notes:
        say(f"note: {remark}")
    right = sum(row.right for row in report.rows)
    say(f"{right} of {len(report.rows)} probes met what the policies say")


def _cells(row: Row) -> tuple[str, ...]:
    probe = row.probe
    port = f"{probe.port}/{probe.proto}" if probe.port else probe.proto
    mark = "ok" if row.right else "WRONG"
    ends = (probe.source, probe.target, port)
    return (mark, *ends, probe.expected.value, row.seen.value, row.reason, shortened(row.rule))


def shortened(rule: str) -> str:
    """The first of many policies that select an endpoint, and how many more there are."""
    first, *others = rule.split(", ")
    return f"{first} and {len(others)} more" if others else rule
