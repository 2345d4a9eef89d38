"""What a command prints: JSON for programs, aligned columns for people.

With `-o json` standard output carries one JSON document (or one per line where the command says
so) and nothing else. A table on a terminal fits its width and has colours; anywhere else it is one
line per row, as long as it takes, so that grep and awk find whole rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# The first word of a cell chooses its colour, whichever table it stands in.
_STYLES: Mapping[str, str] = {
    "FORWARDED": "green",
    "DROPPED": "red",
    "REDIRECTED": "cyan",
    "ALLOW": "green",
    "DENY": "red",
    "ok": "green",
    "ready": "green",
    "connected": "green",
    "enforced": "green",
    "realised": "green",
    "failed": "bold red",
    "WRONG": "bold red",
    "accepted,": "yellow",
}


_INDENT = 13  # under the verdict, past the time


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"


def write_json(body: bytes) -> None:
    """A server's JSON, laid out; keys keep the server's order."""
    sys.stdout.write(json.dumps(json.loads(body), indent=2, ensure_ascii=False) + "\n")


def write_table(head: Sequence[str], rows: Iterable[Sequence[str]], empty: str) -> None:
    """`empty` is said on stderr when there is no row."""
    lines = [tuple(row) for row in rows]
    if not lines:
        note(empty)
    elif on_terminal():
        _draw(head, lines)
    else:
        for line in _aligned([tuple(head), *lines]):
            sys.stdout.write(line + "\n")
    sys.stdout.flush()


def on_terminal() -> bool:
    return sys.stdout.isatty()


def _aligned(lines: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _draw(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The last column takes what room is left and folds in it; the others keep to their content
    as long as they leave it a third of the screen."""
    from rich.table import Table

    screen = _console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    spare = screen.width - sum(width + 2 for width in widths[:-1])
    fits = spare >= min(widths[-1], screen.width // 3)
    for at, name in enumerate(head):
        table.add_column(name, overflow="fold", no_wrap=fits and at < len(head) - 1)
    for row in rows:
        table.add_row(*map(styled, row))
    screen.print(table)


def styled(cell: str) -> Text:
    """Text, never markup: `egress[0]` is no tag. Label lists may break after a comma."""
    from rich.text import Text

    style = _STYLES.get(cell.partition(" ")[0], "")
    spaced = cell.replace(",", ", ") if "," in cell and " " not in cell else cell
    return Text(spaced, style=style)


def _console() -> Console:
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, soft_wrap=False)


def verdict_style(word: str) -> str:
    return _STYLES.get(word, "")


def say_styled(parts: Sequence[tuple[str, str]]) -> None:
    """(text, style) pairs on a terminal: one line, or the last of them indented below the rest."""
    from rich.padding import Padding
    from rich.text import Text

    screen = _console()
    *head, last = parts
    if sum(len(text) for text, _ in parts) <= screen.width:
        screen.print(Text.assemble(*parts))
        return
    screen.print(Text.assemble(*head))
    screen.print(Padding(Text(*last), (0, 0, 0, _INDENT)))


def say(line: str) -> None:
    """One line for people, on standard output, at once even into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def lasting(seconds: float) -> str:
    """The two largest units: 90061 s is "1 d 1 h"."""
    left, parts = round(seconds), list[str]()
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def note(line: str) -> None:
    """One line beside the output proper."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
