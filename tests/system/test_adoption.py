"""Namespaces that had a network before the node knew them: declared, they come under policy and
keep the connections they have. The network is a bridge, as container runtimes make one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.runtime.errors import Invalid
from tests.fakes.netns import Namespace, namespace
from tests.fakes.stack import Stack, eventually
from tests.system.test_cni import LET_IN

pytestmark = pytest.mark.kernel

BRIDGE = "tsr-adopt0"
DECLARED = """\
namespace = "shop"
name = "{name}"
netns = "{netns}"
labels = ["k8s:app={name}"]
adopt = true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("endpoints")


@pytest.fixture(scope="module")
def stack(folder: Path) -> Iterator[Stack]:
    made = Stack.start("adopt", {"agent": {"endpoints_dir": str(folder)}})
    yield made
    made.stop()


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


@dataclass(frozen=True)
class Bridged:
    space: Namespace
    address: str
    outer: str


@contextmanager
def bridge() -> Iterator[None]:
    ip(f"link add {BRIDGE} type bridge")
    try:
        ip(f"addr add 10.98.0.1/24 dev {BRIDGE}")
        ip(f"link set {BRIDGE} up")
        yield
    finally:
        ip(f"link del {BRIDGE}")


@contextmanager
def bridged(number: int) -> Iterator[Bridged]:
    with namespace() as space:
        made = Bridged(space, f"10.98.0.{number}", f"tsradopt{number}")
        ip(f"link add {made.outer} type veth peer name eth0 netns {space.name}")
        ip(f"link set {made.outer} master {BRIDGE} up")
        space.ip(f"addr add {made.address}/24 dev eth0")
        space.ip("link set eth0 up")
        space.ip("route add default via 10.98.0.1")
        yield made


def declare(folder: Path, name: str, of: Bridged) -> None:
    (folder / f"{name}.toml").write_text(DECLARED.format(name=name, netns=of.space.name))


def ready(stack: Stack, *names: str) -> bool:
    return {e["name"] for e in stack.endpoints() if e["state"] == "ready"} == set(names)


def test_what_was_there_before_is_judged_and_keeps_its_connections(
    stack: Stack, folder: Path
) -> None:
    with bridge(), bridged(10) as web, bridged(11) as db:
        with (
            db.space.listen(5432) as listener,
            db.space.listen(5433),
            web.space.connect(db.address, 5432, timeout_s=2) as client,
        ):
            server, _ = listener.accept()
            server.settimeout(10)
            client.settimeout(10)

            def alive() -> bool:
                client.sendall(b"x")
                assert server.recv(1) == b"x"
                server.sendall(b"y")
                return client.recv(1) == b"y"

            with server:
                assert alive()
                declare(folder, "web", web)
                declare(folder, "db", db)
                eventually(lambda: ready(stack, "web", "db"), stack.log("agent"))
                assert {e["ip"] for e in stack.endpoints()} == {web.address, db.address}
                assert alive()
                stack.apply(LET_IN)
                assert alive()
                assert web.space.can_connect(db.address, 5432)
                assert not web.space.can_connect(db.address, 5433)

                stack.kill("agent")
                stack.start_process("agent")
                stack.wait_ready()
                assert ready(stack, "web", "db")
                assert alive()

                stack.withdraw("CiliumNetworkPolicy", "shop", "db")
                for name in ("web", "db"):
                    (folder / f"{name}.toml").unlink()
                    stack.remove(name)
                assert stack.endpoints() == []
                assert alive()
        assert web.space.ping(db.address, timeout_s=2)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ("addr add 10.98.0.99/24 dev eth0", "10.98.0.99"),
        ("addr flush dev eth0", "none"),
        ("link set eth0 down name other", "no such interface"),
    ],
)
def test_an_interface_that_cannot_be_judged_is_refused_as_it_is(
    stack: Stack, spoil: str, words: str
) -> None:
    with bridge(), bridged(12) as one:
        one.space.ip(spoil)
        body = {"namespace": "shop", "name": "x", "netns": one.space.name, "adopt": True}
        reply = stack.agent.exchange("POST", "/v1/endpoints", body=json.dumps(body).encode())
        assert not reply.ok
        assert words in json.loads(reply.body)["detail"]
        assert stack.endpoints() == []
        shown = subprocess.run(["ip", "link", "show", one.outer], capture_output=True, check=True)
        assert BRIDGE.encode() in shown.stdout


def test_a_pair_within_the_namespace_is_refused(stack: Stack) -> None:
    with namespace() as space:
        space.ip("link add eth0 type veth peer name eth1")
        space.ip("addr add 10.98.0.5/24 dev eth0")
        body = {"namespace": "shop", "name": "x", "netns": space.name, "adopt": True}
        with pytest.raises(Invalid, match="no veth pair whose other side"):
            stack.agent.request("POST", "/v1/endpoints", body=json.dumps(body).encode())
