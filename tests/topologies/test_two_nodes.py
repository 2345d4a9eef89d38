"""Two nodes, natively routed: who is who across the fabric, and what policy makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.cluster import Cluster, ClusterNode, Pod
from tests.fakes.stack import eventually

pytestmark = pytest.mark.kernel

POLICY = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: {name}, namespace: shop}}
spec:
  endpointSelector: {{matchLabels: {{app: {app}}}}}
  {side}:
  - {peers}
"""


@pytest.fixture(scope="module", autouse=True)
def pods(cluster: Cluster) -> None:
    one, two = cluster.nodes
    cluster.add_pod(one, "client", app="client")
    cluster.add_pod(one, "neighbour", app="db")
    cluster.add_pod(two, "db", app="db")
    cluster.add_pod(two, "other", app="other")
    cluster.settled()


@pytest.fixture(autouse=True)
def no_policy(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.clear_policies()


def pod(cluster: Cluster, name: str) -> Pod:
    return next(one for one in cluster.pods if one.name == name)


def policy(app: str, peers: str, side: str = "ingress", name: str = "p") -> str:
    return POLICY.format(name=name, app=app, side=side, peers=peers)


def last_flow(node: ClusterNode, verdict: str, **ends: str) -> dict:
    """The newest flow of that verdict between these addresses."""

    def found() -> dict | None:
        for flow in reversed(node.flows(verdict=verdict)):
            if all(flow[end]["ip"] == ip for end, ip in ends.items()):
                return flow
        return None

    return eventually(found, f"no {verdict} flow {ends}")


def test_pods_of_two_nodes_reach_each_other_as_who_they_are(cluster: Cluster) -> None:
    client, db, other = (pod(cluster, name) for name in ("client", "db", "other"))
    cluster.apply(policy("db", "fromEndpoints: [{matchLabels: {app: client}}]"))
    with db.ns.listen(80):
        assert client.ns.can_connect(db.ip, 80)
        assert not other.ns.can_connect(db.ip, 80)
        assert not pod(cluster, "neighbour").ns.can_connect(db.ip, 80)
    flow = last_flow(db.node, "forwarded", source=client.ip, destination=db.ip)
    assert flow["source"]["identity"] == client.identity
    assert (flow["source"]["name"], flow["destination"]["name"]) == ("client", "db")
    assert flow["rule"] == "CiliumNetworkPolicy shop/p rule 0 ingress[0] line 7"


def test_both_ends_judge_each_on_its_node(cluster: Cluster) -> None:
    client, db = pod(cluster, "client"), pod(cluster, "db")
    cluster.apply(policy("client", "toEndpoints: [{matchLabels: {app: other}}]", "egress"))
    with db.ns.listen(80), pod(cluster, "other").ns.listen(80):
        assert not client.ns.can_connect(db.ip, 80)
        assert client.ns.can_connect(pod(cluster, "other").ip, 80)
    flow = last_flow(client.node, "dropped", source=client.ip, destination=db.ip)
    assert (flow["direction"], flow["drop_reason_desc"]) == ("EGRESS", "POLICY_DENIED")
    assert flow["destination"]["identity"] == db.identity
    assert not [f for f in db.node.flows(verdict="dropped") if f["source"]["ip"] == client.ip]


def test_a_new_identity_is_let_in_on_the_other_node(cluster: Cluster) -> None:
    db = pod(cluster, "db")
    cluster.apply(policy("db", "fromEndpoints: [{matchLabels: {tier: fresh}}]"))
    fresh = cluster.add_pod(cluster.nodes[0], "fresh", tier="fresh")
    with db.ns.listen(80):
        eventually(lambda: fresh.ns.can_connect(db.ip, 80), "the new pod is not let in")
    cluster.remove_pod(fresh)
    cluster.settled()


def test_a_node_is_host_here_and_remote_node_there(cluster: Cluster) -> None:
    one, two = cluster.nodes
    client, db = pod(cluster, "client"), pod(cluster, "db")
    cluster.apply(policy("db", "fromEntities: [remote-node]"))
    with db.ns.listen(80):
        assert one.ns.can_connect(db.ip, 80)
        assert not client.ns.can_connect(db.ip, 80)
        assert not can_reach(cluster, db)
    flow = last_flow(two, "forwarded", source=one.ip, destination=db.ip)
    assert flow["source"]["identity"] == 6
    cluster.apply(policy("db", "fromEntities: [host]"))
    with db.ns.listen(80):
        assert not one.ns.can_connect(db.ip, 80)
        assert two.ns.can_connect(db.ip, 80)
    flow = last_flow(two, "forwarded", source=two.ip, destination=db.ip)
    assert flow["source"]["identity"] == 1


def can_reach(cluster: Cluster, target: Pod) -> bool:
    """From the world, which has no route to pods of its own."""
    cluster.world.ip(f"route replace {target.ip} via {target.node.ip}")
    return cluster.world.can_connect(target.ip, 80)


def test_pods_reach_nodes_as_policy_says(cluster: Cluster) -> None:
    one, two = cluster.nodes
    client = pod(cluster, "client")
    cluster.apply(policy("client", "toEntities: [host]", "egress"))
    with one.ns.listen(80), two.ns.listen(80):
        assert client.ns.can_connect(one.ip, 80)
        assert not client.ns.can_connect(two.ip, 80)
    cluster.apply(policy("client", "toEntities: [remote-node]", "egress"))
    with one.ns.listen(80), two.ns.listen(80):
        assert not client.ns.can_connect(one.ip, 80)
        assert client.ns.can_connect(two.ip, 80)


def test_the_world_is_neither_node_nor_pod(cluster: Cluster) -> None:
    db = pod(cluster, "db")
    with db.ns.listen(80):
        cluster.apply(policy("db", "fromEntities: [world]"))
        assert can_reach(cluster, db)
        assert not pod(cluster, "client").ns.can_connect(db.ip, 80)
        flow = last_flow(db.node, "forwarded", source=cluster.world_ip)
        assert flow["source"]["identity"] == 2
        cluster.apply(policy("db", "fromCIDR: [10.88.0.200/32]"))
        assert can_reach(cluster, db)
        cluster.apply(policy("db", "fromCIDRSet: [{cidr: 10.0.0.0/8, except: [10.88.0.128/25]}]"))
        assert not can_reach(cluster, db)


def test_routes_follow_the_endpoints_and_survive_the_agent(cluster: Cluster) -> None:
    one, two = cluster.nodes
    db = pod(cluster, "db")

    def route() -> str:
        return one.ns.ip(f"route show {db.ip}")

    assert f"via {two.ip}" in route()
    one.kill()
    assert f"via {two.ip}" in route()
    one.start()
    one.wait_ready()
    cluster.settled()
    assert f"via {two.ip}" in route()
    late = cluster.add_pod(two, "late", app="late")
    eventually(lambda: "via" in one.ns.ip(f"route show {late.ip}"), "no route to the new pod")
    cluster.remove_pod(late)
    eventually(lambda: not one.ns.ip(f"route show {late.ip}"), "the route stays")
