"""cnitool, the specification's own runtime: our plugin first in a chain, as libcni calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.libcni import STANDARD_PLUGINS, install_plugin
from tests.fakes.netns import Namespace, namespace
from tests.fakes.stack import Stack
from tests.system.test_cni import nothing_left

pytestmark = pytest.mark.kernel

TOOL = Path(sys.prefix, "bin", "cnitool")
PLUGINS = [
    {"type": "tessera", "namespace": "shop", "capabilities": {"labels": True}},
    {"type": "tuning", "sysctl": {"net.core.somaxconn": "321"}},
    {"type": "portmap", "capabilities": {"portMappings": True}},
]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    if not TOOL.exists():
        pytest.skip("no cnitool: scripts/cnitool.sh builds it")
    made = Stack.start("cnitool")
    yield made
    made.stop()


class Cnitool:
    def __init__(self, stack: Stack, folder: Path) -> None:
        install_plugin(folder, stack.layout.socket("agent"))
        self.environ = os.environ | {
            "CNI_PATH": f"{folder}:{STANDARD_PLUGINS}",
            "NETCONFPATH": str(folder),
            "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=web",
            "CAP_ARGS": json.dumps({"labels": {"app": "web"}}),
        }
        network = {"cniVersion": "1.0.0", "name": "pods", "plugins": PLUGINS}
        (folder / "10-pods.conflist").write_text(json.dumps(network))

    def run(self, verb: str, space: Namespace) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [TOOL, verb, "pods", space.path],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=90,
        )


@pytest.fixture
def cnitool(stack: Stack, tmp_path: Path) -> Cnitool:
    return Cnitool(stack, tmp_path)


def test_a_container_is_added_checked_and_deleted(stack: Stack, cnitool: Cnitool) -> None:
    with namespace() as space:
        added = cnitool.run("add", space)
        assert added.returncode == 0, added.stderr
        result = json.loads(added.stdout)
        address = result["ips"][0]["address"]
        assert address in space.ip("addr show eth0")
        (made,) = stack.endpoints()
        assert (made["name"], f"{made['ip']}/32") == ("web", address)
        assert "k8s:app=web" in made["labels"]
        assert space.call(lambda: Path("/proc/sys/net/core/somaxconn").read_text()) == "321\n"
        checked = cnitool.run("check", space)
        assert checked.returncode == 0, checked.stderr
        for _ in range(2):
            deleted = cnitool.run("del", space)
            assert deleted.returncode == 0, deleted.stderr
        assert nothing_left(stack)


def test_checking_what_is_broken_fails_with_the_reason(stack: Stack, cnitool: Cnitool) -> None:
    with namespace() as space:
        assert cnitool.run("add", space).returncode == 0
        space.ip("route del default")
        checked = cnitool.run("check", space)
        assert checked.returncode != 0
        assert "the route to 0.0.0.0/0 is gone" in checked.stdout + checked.stderr
        assert cnitool.run("del", space).returncode == 0
        assert nothing_left(stack)
