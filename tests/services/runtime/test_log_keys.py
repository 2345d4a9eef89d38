"""Every key of every log call is a word of the vocabulary."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from services.runtime.keys import KEYS

ROOT = Path(__file__).parents[3]
SOURCES = [p for part in ("services", "datapath") for p in sorted((ROOT / part).rglob("*.py"))]
LEVELS = {"debug", "info", "warning", "error", "exception"}
# Arguments of the logging library itself.
NOT_DATA = {"exc_info", "event"}


def log_calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "log"
            and node.func.attr in LEVELS
        ):
            yield node


def test_every_log_key_is_a_word_of_the_vocabulary() -> None:
    unknown = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {keyword.arg}"
        for path in SOURCES
        for call in log_calls(path)
        for keyword in call.keywords
        if keyword.arg is not None and keyword.arg not in KEYS.keys() | NOT_DATA
    ]
    assert not unknown, "add the word and its meaning to services/runtime/keys.py"


def test_every_event_name_is_a_dotted_constant() -> None:
    odd = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in SOURCES
        for call in log_calls(path)
        if not (
            call.args
            and isinstance(call.args[0], ast.Constant)
            and isinstance(call.args[0].value, str)
            and "." in call.args[0].value
            and " " not in call.args[0].value
        )
    ]
    assert not odd


def test_the_scan_finds_log_calls() -> None:
    assert any(True for path in SOURCES for _ in log_calls(path))
