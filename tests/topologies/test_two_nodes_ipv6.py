"""IPv6 between two nodes and inside one: who is who, and what policy makes of it."""

from __future__ import annotations

import pytest

from tests.fakes.cluster import Cluster, Pod
from tests.fakes.stack import eventually

pytestmark = pytest.mark.kernel

POLICY = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: six, namespace: shop}}
spec:
  endpointSelector: {{matchLabels: {{app: {app}}}}}
  {side}:
  - {peers}
"""


@pytest.fixture(scope="module", autouse=True)
def pods(cluster: Cluster) -> None:
    one, two = cluster.nodes
    cluster.add_pod(one, "client", app="client")
    cluster.add_pod(one, "neighbour", app="neighbour")
    cluster.add_pod(two, "db", app="db")
    cluster.settled()


def pod(cluster: Cluster, name: str) -> Pod:
    return next(one for one in cluster.pods if one.name == name)


def policy(app: str, peers: str, side: str = "ingress") -> str:
    return POLICY.format(app=app, side=side, peers=peers)


def test_pods_have_both_families_and_are_the_same_in_both(cluster: Cluster) -> None:
    client, neighbour, db = (pod(cluster, name) for name in ("client", "neighbour", "db"))
    cluster.apply(policy("db", "fromEndpoints: [{matchLabels: {app: client}}]"))
    with db.ns.listen(80, "::"):
        for address in (db.ip, db.ip6):
            assert client.ns.can_connect(address, 80)
            assert not neighbour.ns.can_connect(address, 80)

    def told() -> bool:
        return any(
            flow["source"]["ip"] == client.ip6 and flow["source"]["name"] == "client"
            for flow in db.node.flows(verdict="forwarded")
        )

    eventually(told, "no flow over IPv6 names the client")


def test_pods_of_one_node_are_judged_over_ipv6(cluster: Cluster) -> None:
    client, neighbour = pod(cluster, "client"), pod(cluster, "neighbour")
    with neighbour.ns.listen(80, "::"):
        cluster.apply(policy("neighbour", "fromEndpoints: [{matchLabels: {app: client}}]"))
        assert client.ns.can_connect(neighbour.ip6, 80)
        cluster.apply(policy("neighbour", "fromEndpoints: [{matchLabels: {app: db}}]"))
        assert not client.ns.can_connect(neighbour.ip6, 80)


def test_nodes_and_the_world_are_who_they_are_over_ipv6(cluster: Cluster) -> None:
    one, two = cluster.nodes
    db = pod(cluster, "db")
    cluster.world.ip(f"-6 route replace {db.ip6} via {two.ip6}")
    reached = {
        "host": lambda: two.ns.can_connect(db.ip6, 80),
        "remote-node": lambda: one.ns.can_connect(db.ip6, 80),
        "world": lambda: cluster.world.can_connect(db.ip6, 80),
    }
    with db.ns.listen(80, "::"):
        for entity in reached:
            cluster.apply(policy("db", f"fromEntities: [{entity}]"))
            # The node's own processes reach its endpoints whatever policy says of others.
            expected = {entity, "host"}
            assert {name for name, connects in reached.items() if connects()} == expected


def test_prefixes_of_ipv6_choose_the_world(cluster: Cluster) -> None:
    db = pod(cluster, "db")
    cluster.world.ip(f"-6 route replace {db.ip6} via {db.node.ip6}")
    with db.ns.listen(80, "::"):
        cluster.apply(policy("db", "fromCIDR: ['fd88::/16']"))
        assert cluster.world.can_connect(db.ip6, 80)
        cluster.apply(policy("db", "fromCIDRSet: [{cidr: 'fd88::/16', except: ['fd88::200/128']}]"))
        assert not cluster.world.can_connect(db.ip6, 80)
