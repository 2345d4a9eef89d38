"""A real runtime: podman starts containers, the node judges their packets, nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.podman import Podman, podman
from tests.fakes.stack import Stack, eventually
from tests.system.test_cni import LET_IN, nothing_left

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def labels_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("labels")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    with podman(tmp_path_factory.mktemp("podman")) as made:
        yield made


@pytest.fixture(scope="module")
def stack(engine: Podman, labels_dir: Path) -> Iterator[Stack]:
    made = Stack.start("podman", {"agent": {"labels_dir": str(labels_dir)}})
    yield made
    made.stop()


@pytest.fixture(scope="module", autouse=True)
def installed(stack: Stack, engine: Podman) -> None:
    """By the command, in podman's folders: two networks, one of them with labels."""
    where = ["--bin-dir", engine.plugins, "--conf-dir", engine.networks]
    socket = ["--agent-socket", stack.layout.socket("agent"), "--namespace", "shop"]
    for words in (
        ["--network", "shop", "--file", "10-shop.conflist"],
        ["--network", "fronts", "--file", "20-fronts.conflist", "-l", "app=web"],
    ):
        tessera("cni", "install", *where, *socket, *words)


def tessera(*words: object, path: Path | str = "") -> None:
    command = [sys.executable, "-m", "services.cli.main", *map(str, words)]
    environ = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def address_of(stack: Stack, name: str) -> str:
    return next(str(one["ip"]) for one in stack.endpoints() if one["name"] == name)


def test_containers_of_podman_are_judged_by_policy_and_leave_nothing(
    stack: Stack, engine: Podman, labels_dir: Path
) -> None:
    (labels_dir / "shop").mkdir()
    (labels_dir / "shop" / "db").write_text("app=db\n")
    engine.start("db", "shop", "/bin/sh", "-c", "httpd -p 5433 -h /; exec httpd -f -p 5432 -h /")
    engine.start("web", "fronts", "/bin/sleep", "1000")
    engine.start("cron", "shop", "/bin/sleep", "1000")
    labels = {one["name"]: set(one["labels"]) for one in stack.endpoints()}
    assert "k8s:app=db" in labels["db"]
    assert "k8s:app=web" in labels["web"]
    db = address_of(stack, "db")
    assert engine.connects("cron", db, 5432)

    stack.apply(LET_IN)
    assert engine.connects("web", db, 5432)
    assert not engine.connects("web", db, 5433)
    assert not engine.connects("cron", db, 5432)

    def judged() -> bool:
        return {
            ("web", 5432, "FORWARDED"),
            ("web", 5433, "DROPPED"),
            ("cron", 5432, "DROPPED"),
        } <= {
            (flow["source"]["name"], flow["destination"]["port"], flow["verdict"])
            for flow in stack.flows(namespace="shop", name="db", last="100")
        }

    eventually(judged, f"no such flows: {stack.flows(last='100')}")

    for name in ("web", "cron", "db"):
        engine.remove(name)
    stack.withdraw("CiliumNetworkPolicy", "shop", "db")
    assert nothing_left(stack)


def test_a_container_that_ends_by_itself_leaves_nothing(stack: Stack, engine: Podman) -> None:
    engine.start("brief", "shop", "/bin/sleep", "0.1")
    eventually(lambda: stack.endpoints() == [], "the endpoint is still there")
    engine.remove("brief")
    assert nothing_left(stack)


def test_a_container_without_a_network_is_given_one_by_its_name(
    stack: Stack, engine: Podman
) -> None:
    engine.start("db", "shop", "/bin/httpd", "-f", "-p", "5432", "-h", "/")
    engine.start("alone", "none", "/bin/sleep", "1000")
    pid = engine.run("inspect", "--format", "{{.State.Pid}}", "alone").stdout.strip()
    container = engine.run("inspect", "--format", "{{.Id}}", "alone").stdout.strip()
    db = address_of(stack, "db")
    assert not engine.connects("alone", db, 5432)
    for named in (["--container", container[:12]], ["--pid", pid]):
        add = ["endpoint", "add", "shop/alone", "-l", "app=x", *named]
        tessera(*add, "--agent-socket", stack.layout.socket("agent"))
        assert engine.connects("alone", db, 5432)
        tessera("endpoint", "delete", "shop/alone", "--agent-socket", stack.layout.socket("agent"))
        assert not engine.connects("alone", db, 5432)
    engine.remove("alone")
    engine.remove("db")
    assert nothing_left(stack)


BRIDGE: dict[str, Any] = {
    "type": "bridge",
    "bridge": "tsr-podman0",
    "isGateway": True,
    "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.97.0.0/24"}]]},
}


@pytest.fixture
def plain(engine: Podman, tmp_path: Path) -> Iterator[str]:
    """A network of podman's own kind."""
    ipam = BRIDGE["ipam"] | {"dataDir": str(tmp_path)}
    network = {"cniVersion": "1.0.0", "name": "plain", "plugins": [BRIDGE | {"ipam": ipam}]}
    file = engine.networks / "87-plain.conflist"
    file.write_text(json.dumps(network))
    yield "plain"
    file.unlink()
    subprocess.run(["ip", "link", "del", BRIDGE["bridge"]], check=True)


def test_containers_of_another_network_are_adopted_as_they_run(
    stack: Stack, engine: Podman, plain: str
) -> None:
    engine.start("db", plain, "/bin/sh", "-c", "httpd -p 5433 -h /; exec httpd -f -p 5432 -h /")
    engine.start("web", plain, "/bin/sleep", "1000")
    socket = ["--agent-socket", stack.layout.socket("agent")]
    for name in ("db", "web"):
        words = ["--container", name, "--adopt", "-l", f"app={name}"]
        tessera("endpoint", "add", f"shop/{name}", *words, *socket, path=engine.command.parent)
    db = address_of(stack, "db")
    assert db.startswith("10.97.0.")
    stack.apply(LET_IN)
    assert engine.connects("web", db, 5432)
    assert not engine.connects("web", db, 5433)
    stack.withdraw("CiliumNetworkPolicy", "shop", "db")
    engine.remove("web")
    eventually(lambda: len(stack.endpoints()) == 1, "the container's endpoint is still there")
    tessera("endpoint", "delete", "shop/db", *socket)
    engine.remove("db")
    assert nothing_left(stack)


def test_a_container_lives_through_the_death_of_the_agent(stack: Stack, engine: Podman) -> None:
    engine.start("db", "shop", "/bin/httpd", "-f", "-p", "5432", "-h", "/")
    engine.start("cron", "shop", "/bin/sleep", "1000")
    db = address_of(stack, "db")
    stack.kill("agent")
    assert engine.connects("cron", db, 5432)
    stack.start_process("agent")
    stack.wait_ready()
    assert engine.connects("cron", db, 5432)
    engine.remove("db")
    engine.remove("cron")
    assert nothing_left(stack)
