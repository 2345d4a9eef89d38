"""The seed's fourth policy, as it is, on a node's own packets; and ways not to be locked out."""

from __future__ import annotations

import json
import os
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


def apply_for(
    guarded: Cluster, seconds: str, path: Path, state: Path
) -> subprocess.CompletedProcess:
    server = f"unix://{guarded.plane.layout.socket('apid')}"
    words = ("apply", "--wait", "--confirm", seconds, "-f", str(path), "--server", server)
    return policy_command(state, *words)


def policy_command(state: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.cli.main", "policy", *words],
        capture_output=True, text=True, env=os.environ | {"XDG_STATE_HOME": str(state)},
        check=False, timeout=60,
    )  # fmt: skip


def test_what_nobody_confirms_is_taken_back(guarded: Cluster, tmp_path: Path) -> None:
    _, two = guarded.nodes
    (path,) = SEED.rglob("04-*.yaml")
    with two.ns.listen(KUBELET):
        done = apply_for(guarded, "2s", path, tmp_path)
        assert done.returncode == 0, done.stderr
        assert "taken back in 2 s unless: tessera policy confirm" in done.stderr
        eventually(lambda: guarded.world.can_connect(two.ip, KUBELET), "it stays")
        assert json.loads(guarded.plane.rest.get("/v1/policies"))["policies"] == []
        assert policy_command(tmp_path, "confirm").returncode == 1

        done = apply_for(guarded, "30s", path, tmp_path)
        assert done.returncode == 0, done.stderr
        kept = policy_command(tmp_path, "confirm")
        assert kept.stdout.startswith("revision ")
        assert not guarded.world.can_connect(two.ip, KUBELET)
    guarded.clear_policies()
