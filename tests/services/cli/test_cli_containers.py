"""A container by its runtime's command, or by the state of what started it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from services.cli.containers import Container, container_of, find
from services.runtime.errors import Invalid, NotFound

ID = "0123456789abcdef"
MINE = f"/proc/{os.getpid()}/ns/net"


def state(root: Path, folder: str, container: str, **content: int) -> None:
    path = root / folder / container
    path.mkdir(parents=True)
    name = "status" if "crun" in folder else "state.json"
    (path / name).write_text(json.dumps(content))


@pytest.fixture
def no_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "key"),
    [
        ("run/runc", "init_process_pid"),
        ("run/crun", "pid"),
        ("run/containerd/runc/k8s.io", "init_process_pid"),
        ("run/docker/runtime-runc/moby", "init_process_pid"),
    ],
)
def test_an_id_is_found_where_its_runtime_keeps_state(
    no_commands: Path, folder: str, key: str
) -> None:
    state(no_commands, folder, ID, **{key: os.getpid()})
    assert find(ID, no_commands) == Container(MINE)
    assert find(ID[:6], no_commands) == Container(MINE)


def test_the_beginning_of_two_ids_names_neither(no_commands: Path) -> None:
    state(no_commands, "run/runc", ID, init_process_pid=os.getpid())
    state(no_commands, "run/crun", f"{ID[:8]}ffff", pid=1)
    with pytest.raises(Invalid, match="write more of it"):
        find(ID[:6], no_commands)


@pytest.mark.parametrize("ref", ["absent", "012"])
def test_what_nobody_knows_says_where_it_was_looked_for(no_commands: Path, ref: str) -> None:
    state(no_commands, "run/runc", ID, init_process_pid=os.getpid())
    with pytest.raises(NotFound, match="run/runc"):
        find(ref, no_commands)


def test_a_container_that_has_ended_is_not_found(no_commands: Path) -> None:
    state(no_commands, "run/runc", ID, init_process_pid=2**22 + 7)
    with pytest.raises(NotFound, match="does not run"):
        find(ID, no_commands)


def test_a_runtimes_own_command_is_asked_first_and_knows_labels(
    no_commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [{"State": {"Pid": os.getpid()}, "Config": {"Labels": {"app": "web", "a": ""}}}]
    command = no_commands / "podman"
    command.write_text(f"#!/bin/sh\n[ \"$4\" = web ] || exit 125\necho '{json.dumps(told)}'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{no_commands}:/bin:/usr/bin")
    assert find("web", no_commands) == Container(MINE, ("container:a=", "container:app=web"))
    with pytest.raises(NotFound, match="podman"):
        find("other", no_commands)


@pytest.mark.parametrize("described", [{}, {"State": {"Pid": 0}}])
def test_a_description_without_a_process_is_of_no_running_container(described) -> None:
    with pytest.raises(NotFound):
        container_of(described, "web")
