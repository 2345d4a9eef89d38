"""Policy manifests as the command line names them: files, directories, standard input."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.runtime.errors import Invalid

SUFFIXES = (".yaml", ".yml", ".json")

KINDS = {
    "cnp": "CiliumNetworkPolicy",
    "ciliumnetworkpolicy": "CiliumNetworkPolicy",
    "ccnp": "CiliumClusterwideNetworkPolicy",
    "ciliumclusterwidenetworkpolicy": "CiliumClusterwideNetworkPolicy",
    "np": "NetworkPolicy",
    "netpol": "NetworkPolicy",
    "networkpolicy": "NetworkPolicy",
}
CLUSTER_SCOPED = frozenset({"CiliumClusterwideNetworkPolicy"})


@dataclass(frozen=True, slots=True)
class Manifest:
    source: str
    text: bytes


def read(paths: Sequence[str]) -> tuple[Manifest, ...]:
    """In the order given; a directory's files by name. `-` is standard input."""
    return tuple(manifest for path in paths for manifest in _read_one(path))


def _read_one(path: str) -> Iterator[Manifest]:
    if path == "-":
        yield Manifest("stdin", sys.stdin.buffer.read())
        return
    where = Path(path)
    files = [where]
    if where.is_dir():
        files = sorted(one for one in where.iterdir() if one.suffix in SUFFIXES)
        if not files:
            raise Invalid(f"directory {path} holds no manifest ({', '.join(SUFFIXES)})")
    for file in files:
        try:
            yield Manifest(str(file), file.read_bytes())
        except OSError as error:
            raise Invalid(f"cannot read {file}: {error.strerror}") from error


def kind_named(text: str) -> str:
    kind = KINDS.get(text.lower())
    if kind is None:
        raise Invalid(f"policy kind {text!r} is unknown; known: cnp, ccnp, np and their full names")
    return kind


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "": 1.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|)")


def seconds(text: str) -> float:
    """`30s`, `2m`, `500ms` or a plain number of seconds; never zero."""
    found = _DURATION.fullmatch(text)
    value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not value:
        raise Invalid(f"duration {text!r} is not one; write it like 30s, 2m or 500ms")
    return value
