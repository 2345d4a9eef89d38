"""What a user fears: an agent killed under traffic, a control plane that stands still or dies."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest

from services.cli.layout import SERVICES
from services.runtime.errors import TesseraError
from tests.fakes.netns import Namespace, namespace
from tests.fakes.stack import Stack, eventually
from tests.fakes.traffic import Connections, UdpStream

pytestmark = pytest.mark.kernel

POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: "8080", protocol: TCP}, {port: "7000", protocol: UDP}]
"""
EVERY_POD = "fromEntities: [cluster]"
CONTROL_PLANE = (*SERVICES, "apid", "etcd")


@pytest.fixture
def stack() -> Iterator[Stack]:
    made = Stack.start("fault")
    yield made
    made.stop()


def restart_agent(stack: Stack) -> None:
    stack.kill("agent")
    stack.start_process("agent")

    def ready() -> bool:
        try:
            return len(stack.endpoints()) == 2
        except TesseraError:
            return False

    eventually(ready, f"the agent does not come back: {stack.log('agent')}")


def test_killing_the_agent_loses_no_allowed_packet_and_passes_no_forbidden_one(
    stack: Stack, front: Namespace, api: Namespace, address: str
) -> None:
    stack.apply(POLICY)
    with (
        UdpStream(front, api, address, 7000) as allowed,
        UdpStream(front, api, address, 7001) as forbidden,
        Connections(front, api, address, 8080) as connections,
    ):
        for _ in range(3):
            restart_agent(stack)
    assert allowed.sent > 500
    assert allowed.lost == 0
    assert forbidden.sent > 500
    assert forbidden.received == set()
    assert connections.made > 50
    assert connections.failed == []


def test_enforcement_goes_on_without_the_control_plane_and_resumes_with_it(
    stack: Stack, front: Namespace, api: Namespace, address: str
) -> None:
    stack.apply(POLICY)
    with (
        UdpStream(front, api, address, 7000) as allowed,
        UdpStream(front, api, address, 7001) as forbidden,
        Connections(front, api, address, 8080) as connections,
    ):
        for name in CONTROL_PLANE:
            stack.signal(name, signal.SIGSTOP)
        restart_agent(stack)
        made = connections.made
        eventually(lambda: connections.made > made + 20, "no new connections while it is frozen")
        for name in reversed(CONTROL_PLANE):
            stack.signal(name, signal.SIGCONT)
        stack.wait_ready()
        for name in SERVICES:
            stack.kill(name)
            stack.start_process(name)
        stack.wait_ready()
    assert allowed.lost == 0
    assert forbidden.received == set()
    assert connections.failed == []
    with api.listen(8081):
        assert not front.can_connect(address, 8081)
        stack.apply(POLICY.replace('"8080"', '"8081"'))
        assert front.can_connect(address, 8081)


def test_changes_made_while_the_agent_was_away_are_enforced_when_it_returns(
    stack: Stack, front: Namespace, api: Namespace, address: str
) -> None:
    stack.apply(POLICY)
    with api.listen(8080), api.listen(8081):
        stack.kill("agent")
        revision = stack.apply(POLICY.replace('"8080"', '"8081"'), wait=False)
        assert front.can_connect(address, 8080)
        stack.start_process("agent")
        stack.wait_ready()
        stack.realised(revision)
        assert front.can_connect(address, 8081)
        assert not front.can_connect(address, 8080)


def test_an_etcd_killed_and_started_again_loses_nothing(
    stack: Stack, front: Namespace, api: Namespace, address: str
) -> None:
    stack.apply(POLICY)
    with Connections(front, api, address, 8080) as connections:
        stack.kill("etcd")
        reply = stack.rest.exchange(
            "POST", "/v1/policies", body=POLICY.encode().replace(b"80", b"90")
        )
        assert reply.status == 503, reply.body
        stack.start_etcd()
        stack.wait_ready()
        stack.apply(POLICY.replace("name: api", "name: later").replace('"8080"', '"8081"'))
    assert connections.failed == []
    with api.listen(8081):
        assert front.can_connect(address, 8081)


def test_no_update_opens_a_hole_or_drops_allowed_traffic(
    stack: Stack, front: Namespace, api: Namespace, address: str
) -> None:
    """Every version allows 7000 and 8080 in another way, none 7001; what else they say changes."""
    same = POLICY.replace("fromEndpoints: [{matchLabels: {app: front}}]", "fromEndpoints: [{}]")
    wider = POLICY.replace('port: "7000"', 'port: "6900", endPort: 7000')
    stack.apply(POLICY)
    with (
        UdpStream(front, api, address, 7000) as allowed,
        UdpStream(front, api, address, 7001) as forbidden,
        Connections(front, api, address, 8080) as connections,
        namespace() as other,
    ):
        for turn in range(12):
            stack.apply((same, wider, POLICY)[turn % 3])
            stack.add(other, f"other-{turn}", app=f"other-{turn}")
            stack.remove(f"other-{turn}")
    assert allowed.lost == 0
    assert forbidden.received == set()
    assert connections.failed == []


@pytest.fixture
def small_node() -> Iterator[Stack]:
    made = Stack.start("small", {"agent": {"policy_peer_max": 1024}})
    yield made
    made.stop()


def test_a_policy_that_does_not_fit_leaves_the_last_one_in_force_and_says_why(
    small_node: Stack,
) -> None:
    with namespace() as front, namespace() as api:
        small_node.add(front, "front", app="front")
        address = small_node.add(api, "api", app="api")
        small_node.apply(POLICY)
        small_node.allocate([[f"k8s:app=crowd-{number}"] for number in range(2000)])
        crowd = POLICY.replace("fromEndpoints: [{matchLabels: {app: front}}]", EVERY_POD)
        with api.listen(8080), api.listen(8081):
            revision = small_node.apply(crowd.replace('"8080"', '"8081"'), wait=False)
            query = {"revision": revision, "timeout_s": 3}
            answer = json.loads(small_node.rest.get("/v1/policies/wait", query))
            assert not answer["done"]
            states = {state["node"]: state["reason"] for state in answer["nodes"]}
            assert "policy_peer" in states[small_node.name], states
            assert front.can_connect(address, 8080)
            assert not front.can_connect(address, 8081)
            small_node.withdraw("CiliumNetworkPolicy", "shop", "api")
            small_node.apply(POLICY.replace('"8080"', '"8081"'))
            assert front.can_connect(address, 8081)
