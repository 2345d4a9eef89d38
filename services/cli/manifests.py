"""Policy manifests as the command line names them: files, directories, standard input."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from services.runtime.errors import Invalid

SUFFIXES = (".yaml", ".yml", ".json")

# What the server takes in one request, as services/policy/tree.py says. A larger file is refused
# before all of it is read: /dev/zero has no end.
MAX_BYTES = 1 << 20

KINDS = {
    "cnp": "CiliumNetworkPolicy",
    "ciliumnetworkpolicy": "CiliumNetworkPolicy",
    "ccnp": "CiliumClusterwideNetworkPolicy",
    "ciliumclusterwidenetworkpolicy": "CiliumClusterwideNetworkPolicy",
    "np": "NetworkPolicy",
    "netpol": "NetworkPolicy",
    "networkpolicy": "NetworkPolicy",
    "clusternp": "ClusterNetworkPolicy",
    "clusternetworkpolicy": "ClusterNetworkPolicy",
}
CLUSTER_SCOPED = frozenset({"CiliumClusterwideNetworkPolicy", "ClusterNetworkPolicy"})


@dataclass(frozen=True, slots=True)
class Manifest:
    source: str
    text: bytes


def read(paths: Sequence[str], limit: int = MAX_BYTES) -> tuple[Manifest, ...]:
    """In the order given; a directory's files by name. `-` is standard input."""
    return tuple(manifest for path in paths for manifest in _read_one(path, limit))


def _read_one(path: str, limit: int) -> Iterator[Manifest]:
    if path == "-":
        yield _whole("stdin", sys.stdin.buffer, limit)
        return
    where = Path(path)
    files = [where]
    if where.is_dir():
        files = sorted(one for one in where.iterdir() if one.suffix in SUFFIXES)
        if not files:
            raise Invalid(f"directory {path} holds no manifest ({', '.join(SUFFIXES)})")
    for file in files:
        try:
            with file.open("rb") as opened:
                yield _whole(str(file), opened, limit)
        except OSError as error:
            raise Invalid(f"cannot read {file}: {error.strerror}") from error


def _whole(source: str, stream: IO[bytes], limit: int) -> Manifest:
    text = stream.read(limit + 1)
    if len(text) > limit:
        raise Invalid(
            f"{source} is larger than the {limit >> 20} MiB taken at once; "
            "split it: -f takes many files, and directories"
        )
    return Manifest(source, text)


def kind_named(text: str) -> str:
    kind = KINDS.get(text.lower())
    if kind is None:
        raise Invalid(
            f"policy kind {text!r} is unknown; known: cnp, ccnp, np, clusternp and their full names"
        )
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
