"""Two nodes whose network knows nothing of endpoints: VXLAN between them, NAT to the world."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.fakes.cluster import Cluster, Pod
from tests.fakes.stack import eventually

pytestmark = pytest.mark.kernel

POLICY = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: overlay, namespace: shop}}
spec:
  endpointSelector: {{matchLabels: {{app: {app}}}}}
  {side}:
  - {peers}
"""


@pytest.fixture(scope="module")
def overlay() -> Iterator[Cluster]:
    made = Cluster.start("overlay", config={"routing": "overlay", "masquerade": True})
    try:
        one, two = made.nodes
        made.add_pod(one, "client", app="client")
        made.add_pod(one, "stranger", app="stranger")
        made.add_pod(two, "db", app="db")
        made.settled()
        yield made
    finally:
        made.stop()


@pytest.fixture(autouse=True)
def no_policy(overlay: Cluster) -> Iterator[None]:
    yield
    overlay.clear_policies()


def pod(overlay: Cluster, name: str) -> Pod:
    return next(one for one in overlay.pods if one.name == name)


def policy(app: str, peers: str, side: str = "ingress") -> str:
    return POLICY.format(app=app, side=side, peers=peers)


def test_a_tunnel_carries_who_speaks_in_both_families(overlay: Cluster) -> None:
    client, stranger, db = (pod(overlay, name) for name in ("client", "stranger", "db"))
    overlay.apply(policy("db", "fromEndpoints: [{matchLabels: {app: client}}]"))
    with db.ns.listen(80, "::"):
        for address in (db.ip, db.ip6):
            assert client.ns.can_connect(address, 80)
            assert not stranger.ns.can_connect(address, 80)
    done = client.node.tessera("bpf", "ipcache", "list", "--address", db.ip)
    assert db.node.ip in done.stdout


def test_nodes_and_endpoints_of_the_other_node_reach_each_other(overlay: Cluster) -> None:
    one, two = overlay.nodes
    db = pod(overlay, "db")
    with db.ns.listen(80):
        overlay.apply(policy("db", "fromEntities: [remote-node]"))
        assert one.ns.can_connect(db.ip, 80)
        overlay.apply(policy("db", "fromEntities: [host]"))
        assert two.ns.can_connect(db.ip, 80)
        assert not one.ns.can_connect(db.ip, 80)


def test_large_segments_pass_whole(overlay: Cluster) -> None:
    client, db = pod(overlay, "client"), pod(overlay, "db")
    assert "mtu 1450" in client.ns.ip("link show eth0")
    sent = bytes(range(256)) * 256  # what fits the buffers of both ends
    with db.ns.listen(80) as listener, client.ns.connect(db.ip, 80, timeout_s=5) as near:
        far, _ = listener.accept()
        with far:
            far.settimeout(5)
            near.sendall(sent)
            near.shutdown(socket.SHUT_WR)
            got = b"".join(iter(lambda: far.recv(65536), b""))
    assert got == sent


def test_the_world_sees_the_node_and_its_answers_come_back(overlay: Cluster) -> None:
    client = pod(overlay, "client")
    with overlay.world.listen(80) as listener:
        with client.ns.connect(overlay.world_ip, 80, timeout_s=2) as near:
            far, (source, _) = listener.accept()
            assert source == client.node.ip
            far.sendall(b"answer")
            assert near.recv(16) == b"answer"
            far.close()
        overlay.apply(policy("client", "toEntities: [cluster]", "egress"))
        assert not client.ns.can_connect(overlay.world_ip, 80)
        overlay.apply(policy("client", "toCIDR: [10.88.0.200/32]", "egress"))
        assert client.ns.can_connect(overlay.world_ip, 80)
    assert client.ns.ping(overlay.world_ip)


def test_an_agent_that_is_killed_leaves_the_tunnels_working(overlay: Cluster) -> None:
    client, db = pod(overlay, "client"), pod(overlay, "db")
    with db.ns.listen(80):
        client.node.kill()
        assert client.ns.can_connect(db.ip, 80)
        client.node.start()
        client.node.wait_ready()
        overlay.settled()
        eventually(lambda: client.ns.can_connect(db.ip, 80), "the tunnel is gone")
    status = client.node.tessera("bpf", "verify")
    assert status.returncode == 0, status.stdout + status.stderr
