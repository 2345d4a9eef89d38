"""A running container's network namespace, by the name or id its runtime knows it by.

Runtimes are asked by their own commands, which know names and labels; a container that none of them
knows is looked for by its id where the programs that start containers keep their state.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.runtime.errors import Invalid, NotFound

COMMANDS = ("podman", "docker", "nerdctl")
COMMAND_DEADLINE_S = 15.0
# One folder per container, named by its id (runc and crun; containerd and Docker start runc).
STATE_GLOBS = (
    "run/runc/*/state.json",
    "run/crun/*/status",
    "run/containerd/runc/*/*/state.json",
    "run/docker/runtime-runc/*/*/state.json",
)
SHORTEST_ID = 4


@dataclass(frozen=True, slots=True)
class Container:
    """`labels`: as source:key=value."""

    netns: str
    labels: tuple[str, ...] = ()


def find(ref: str, root: Path = Path("/")) -> Container:
    """`NotFound`: no runtime has it, or it does not run. `Invalid`: several begin like that."""
    commands = [one for one in COMMANDS if shutil.which(one) is not None]
    for command in commands:
        if (described := _inspected(command, ref)) is not None:
            return container_of(described, ref)
    found = sorted(_by_id(ref, root))
    if len(found) > 1:
        raise Invalid(f"container {ref}: {len(found)} ids begin like that; write more of it")
    if not found:
        asked = ", ".join((*commands, *(f"/{glob}" for glob in STATE_GLOBS)))
        raise NotFound(
            f"no running container {ref}: looked into {asked}; another runtime's can be named by "
            "--pid"
        )
    return Container(netns_of(found[0], f"container {ref}"))


def container_of(described: dict[str, Any], ref: str) -> Container:
    """Of what `inspect` prints, which is alike for all three commands."""
    pid = int(described.get("State", {}).get("Pid", 0))
    labels = described.get("Config", {}).get("Labels") or {}
    return Container(
        netns_of(pid, f"container {ref}"),
        tuple(sorted(f"container:{key}={value}" for key, value in labels.items())),
    )


def netns_of(pid: int, what: str) -> str:
    path = f"/proc/{pid}/ns/net"
    if not pid or not Path(path).exists():
        raise NotFound(f"{what} does not run")
    return path


def _inspected(command: str, ref: str) -> dict[str, Any] | None:
    try:
        done = subprocess.run(
            [command, "container", "inspect", "--", ref],
            capture_output=True,
            check=False,
            timeout=COMMAND_DEADLINE_S,
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return found[0] if done.returncode == 0 and found else None


def _by_id(ref: str, root: Path) -> Iterator[int]:
    """Processes of the containers whose id begins with `ref`."""
    if len(ref) < SHORTEST_ID:
        return
    for glob in STATE_GLOBS:
        for path in root.glob(glob):
            if path.parent.name.startswith(ref):
                state = json.loads(path.read_bytes())
                yield int(state.get("init_process_pid") or state.get("pid") or 0)
