"""The seed's fourth policy, as it is, on a node's own packets; and ways not to be locked out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.cluster import Cluster, ClusterNode
from tests.fakes.stack import eventually

pytestmark = pytest.mark.kernel

SEED = Path(__file__).parents[1] / "policies"
KUBELET = 10250


@pytest.fixture(scope="module")
def guarded() -> Iterator[Cluster]:
    made = Cluster.start("hostfw", config={"host_firewall": True})
    try:
        one = made.nodes[0]
        labels = {
            "io.cilium.k8s.policy.serviceaccount": "metrics-server",
            "app": "metrics",
        }
        made.add_pod(one, "metrics-server", namespace="my-metrics-namespace", **labels)
        made.add_pod(one, "other", app="other")
        made.settled()
        yield made
    finally:
        made.stop()


@pytest.fixture
def seed(guarded: Cluster) -> Iterator[str]:
    (path,) = SEED.rglob("04-*.yaml")
    yield path.read_text()
    guarded.clear_policies()


def test_the_seed_lets_only_its_pods_to_the_port_of_every_node(guarded: Cluster, seed: str) -> None:
    one, two = guarded.nodes
    metrics, other = guarded.pods
    with one.ns.listen(KUBELET), two.ns.listen(KUBELET), two.ns.listen(9000):
        assert other.ns.can_connect(two.ip, KUBELET)
        guarded.apply(seed)
        for node in (one, two):
            assert metrics.ns.can_connect(node.ip, KUBELET)
            assert not other.ns.can_connect(node.ip, KUBELET)
            assert not guarded.world.can_connect(node.ip, KUBELET)
        assert not metrics.ns.can_connect(two.ip, 9000)
        assert not one.ns.can_connect(two.ip, KUBELET)


def test_the_control_ports_and_the_nodes_own_connections_stay(guarded: Cluster, seed: str) -> None:
    _, two = guarded.nodes
    guarded.apply(seed)
    with two.ns.listen(22), guarded.world.listen(9000), two.ns.listen(23):
        assert guarded.world.can_connect(two.ip, 22)
        assert not guarded.world.can_connect(two.ip, 23)
        assert two.ns.can_connect(guarded.world_ip, 9000)


def test_a_refused_packet_names_the_policy_and_the_node(guarded: Cluster, seed: str) -> None:
    _, two = guarded.nodes
    guarded.apply(seed)
    with two.ns.listen(KUBELET):
        assert not guarded.world.can_connect(two.ip, KUBELET)

    def told() -> bool:
        return any(
            flow["source"]["ip"] == guarded.world_ip and "host-firewall-allow" in flow["rule"]
            for flow in two.flows(verdict="dropped")
        )

    eventually(told, "no flow names the policy")


def glass(node: ClusterNode, *words: str) -> str:
    argv = [sys.executable, "-m", "services.cli.main", "agent", "break-glass", *words]
    done = subprocess.run(
        [*argv, "--config", str(node.config_file)], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_broken_glass_opens_the_node_with_its_agent_or_without(guarded: Cluster, seed: str) -> None:
    _, two = guarded.nodes
    guarded.apply(seed)
    with two.ns.listen(KUBELET):
        assert not guarded.world.can_connect(two.ip, KUBELET)
        assert "--mend" in glass(two)
        assert guarded.world.can_connect(two.ip, KUBELET)
        assert two.status()["host_firewall"].startswith("broken glass")
        glass(two, "--mend")
        assert not guarded.world.can_connect(two.ip, KUBELET)
        two.kill()
        assert not guarded.world.can_connect(two.ip, KUBELET)
        glass(two)
        assert guarded.world.can_connect(two.ip, KUBELET)
        two.start()
        two.wait_ready()
        assert guarded.world.can_connect(two.ip, KUBELET)
        glass(two, "--mend")
        assert not guarded.world.can_connect(two.ip, KUBELET)
