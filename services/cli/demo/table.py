"""The demo's rows for people. Programs get them whole, with `-o json`."""

from __future__ import annotations

from services.cli.demo.evidence import Row
from services.cli.demo.run import Report
from services.cli.output import on_terminal, say, write_table

_HEAD = ("", "FROM", "TO", "PORT", "EXPECTED", "SEEN", "REASON", "RULE")
_NARROW_HEAD = ("", "FROM", "TO", "PORT", "SEEN", "WHY")


def show(report: Report) -> None:
    if on_terminal():
        write_table(_NARROW_HEAD, [_narrow_cells(row) for row in report.rows], "")
    else:
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


def _narrow_cells(row: Row) -> tuple[str, ...]:
    """What was expected is said only where it was not seen; the two texts share a column."""
    mark, source, target, port, expected, seen, reason, rule = _cells(row)
    surprise = "" if expected == seen else f" (expected {expected})"
    return (mark, source, target, port, seen + surprise, f"{reason}: {rule}" if rule else reason)


def shortened(rule: str) -> str:
    """The first of many policies that select an endpoint, and how many more there are."""
    first, *others = rule.split(", ")
    return f"{first} and {len(others)} more" if others else rule
