"""Pods of containerd, over the interface that Kubernetes uses: labelled by annotations, judged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cli import conflist
from tests.fakes.containerd import Containerd, containerd
from tests.fakes.libcni import install_plugin
from tests.fakes.netns import Namespace
from tests.fakes.stack import Stack
from tests.system.test_cni import LET_IN, nothing_left

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    with containerd(tmp_path_factory.mktemp("containerd")) as made:
        yield made


@pytest.fixture(scope="module")
def stack(engine: Containerd) -> Iterator[Stack]:
    made = Stack.start("containerd")
    install_plugin(engine.plugins, made.layout.socket("agent"))
    network = conflist.Network("tessera")
    (engine.networks / "10-tessera.conflist").write_bytes(conflist.conflist(network))
    yield made
    engine.close()
    made.stop()


def inside(stack: Stack, name: str) -> tuple[Namespace, str]:
    (found,) = [one for one in stack.endpoints() if one["name"] == name]
    return Namespace(Path(found["netns"]).name), str(found["ip"])


def test_pods_are_judged_by_policy_and_leave_nothing(stack: Stack, engine: Containerd) -> None:
    for name in ("web", "db"):
        engine.run_pod("shop", name, {"tessera.io/labels": f"app={name},tier=x"})
    engine.run_pod("shop", "unknown", {})
    labels = {one["name"]: set(one["labels"]) for one in stack.endpoints()}
    assert {"k8s:app=db", "k8s:tier=x", "k8s:io.kubernetes.pod.namespace=shop"} == labels["db"]
    assert labels["unknown"] == {"reserved:init"}
    (web, _), (db, address) = inside(stack, "web"), inside(stack, "db")
    stack.apply(LET_IN)
    with db.listen(5432), db.listen(5433):
        assert web.can_connect(address, 5432, timeout_s=2)
        assert not web.can_connect(address, 5433)
    stack.withdraw("CiliumNetworkPolicy", "shop", "db")
    for name in list(engine.pods):
        engine.remove_pod(name)
    assert nothing_left(stack)
