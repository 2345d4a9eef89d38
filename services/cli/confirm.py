"""`tessera policy apply --confirm 60s` and `tessera policy confirm`: what nobody confirms is taken
back, one policy at a time, as it was before.

    apply ──► note of what changed ──► a process of its own, in no terminal ──► roll back
    confirm ──► note removed                     └── wakes at the deadline; no note: nothing to do

The timer survives the terminal that it came from. It runs on this machine, so this machine's way to
apid must stay open: the host firewall leaves apid's port open whatever policy says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from services.cli import client, views
from services.cli.apply import Outcome
from services.cli.output import note as remark
from services.runtime.clock import SystemClock
from services.runtime.errors import NotFound, TesseraError

# As long it is tried to reach apid once the time is over.
PATIENCE_S: Final = 600.0
_PAUSE_S: Final = 1.0
_LOOK_S: Final = 0.2


class Note(Struct, frozen=True):
    """`back_to`: the revision before. `deadline_s`: wall clock."""

    revision: int
    back_to: int
    server: str
    author: str
    deadline_s: float
    policies: tuple[views.PolicyName, ...]


@dataclass(frozen=True, slots=True)
class Doubted:
    """What was there before, and how long the change may stay unconfirmed."""

    server: str
    back_to: int
    seconds: float

    def expect(self, outcome: Outcome, author: str) -> None:
        """Nothing to take back, nothing to wait for."""
        changed = tuple(
            views.PolicyName(one.kind, one.name, one.namespace)
            for one in outcome.policies
            if one.action != "unchanged"
        )
        if outcome.refused or not outcome.revision or not changed:
            return
        deadline_s = SystemClock().now_s() + self.seconds
        expect(Note(outcome.revision, self.back_to, self.server, author, deadline_s, changed))
        remark(
            f"taken back in {self.seconds:g} s unless: tessera policy confirm {outcome.revision}"
        )


def unconfirmed(server: str, seconds: float) -> Doubted:
    """Before anything is applied: what could not be taken back is not begun."""
    return Doubted(server, revision_now(server), seconds)


def folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "tessera" / "confirm"


def revision_now(server: str) -> int:
    body = client.server(server).get("/v1/policies", {"limit": 1})
    return views.decode(body, views.StoredPolicies).revision


def expect(note: Note) -> None:
    """Starts the time."""
    folder().mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder() / f"{note.revision}.json"
    path.write_bytes(msgspec.json.encode(note))
    subprocess.Popen(
        [sys.executable, "-m", "services.cli.confirm", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def confirm(revision: int) -> list[int]:
    """The revisions that stay; 0: all that wait. Raises `NotFound`."""
    found = [path for path, note in _waiting() if revision in (0, note.revision)]
    kept = []
    for path in found:
        try:
            path.unlink()
        except FileNotFoundError:  # its time was over in this moment
            continue
        kept.append(int(path.stem))
    if not kept:
        which = f"revision {revision} does not wait" if revision else "nothing waits"
        raise NotFound(f"{which} to be confirmed here: it was confirmed, or its time is over")
    return kept


def _waiting() -> Iterator[tuple[Path, Note]]:
    for path in sorted(folder().glob("*.json")):
        yield path, msgspec.json.decode(path.read_bytes(), type=Note)


# ------------------------------------------------------------------ the process that waits


def watch(path: Path) -> None:
    note = msgspec.json.decode(path.read_bytes(), type=Note)
    while SystemClock().now_s() < note.deadline_s:
        if not path.exists():
            return
        time.sleep(_LOOK_S)
    claimed = path.with_suffix(".taken-back")
    try:
        path.rename(claimed)
    except FileNotFoundError:
        return
    left = list(note.policies)
    while left and SystemClock().now_s() < note.deadline_s + PATIENCE_S:
        try:
            take_back(note, left[0])
            left.pop(0)
        except TesseraError:
            time.sleep(_PAUSE_S)
    if not left:
        claimed.unlink()


def take_back(note: Note, policy: views.PolicyName) -> None:
    query: dict[str, str | int] = {
        "revision": note.back_to,
        "kind": policy.kind,
        "name": policy.name,
        "namespace": policy.namespace,
        "author": f"{note.author} (not confirmed)",
    }
    client.server(note.server).request("POST", "/v1/policies/rollback", query)


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
