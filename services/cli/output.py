"""What a command prints: JSON for programs, aligned columns for people.

With `-o json` standard output carries one JSON document (or one per line where the command says
so) and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"


def write_json(body: bytes) -> None:
    """A server's JSON, laid out; keys keep the server's order."""
    sys.stdout.write(json.dumps(json.loads(body), indent=2, ensure_ascii=False) + "\n")


def write_table(head: Sequence[str], rows: Iterable[Sequence[str]], empty: str) -> None:
    """Columns as wide as their content. `empty` is said on stderr when there is no row."""
    lines = [tuple(head), *(tuple(row) for row in rows)]
    if len(lines) == 1:
        note(empty)
        return
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def say(line: str) -> None:
    """One line for people, on standard output, at once even into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def note(line: str) -> None:
    """One line beside the output proper."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
