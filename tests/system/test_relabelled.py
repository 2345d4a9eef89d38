"""Label rules changed under traffic; and a node that goes on attaching without identityd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from tessera_wire.identity.v1 import identity_pb2 as pb
from tessera_wire.identity.v1 import identity_pb2_grpc

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


@pytest.fixture
def stack() -> Iterator[Stack]:
    made = Stack.start("relabel")
    yield made
    made.stop()


@pytest.fixture
def front(stack: Stack) -> Iterator[Namespace]:
    with namespace() as made:
        stack.add(made, "front", app="front", release="7")
        yield made


@pytest.fixture
def api(stack: Stack) -> Iterator[Namespace]:
    with namespace() as made:
        stack.add(made, "api", app="api", release="7")
        yield made


@contextmanager
def identityd(stack: Stack) -> Iterator[identity_pb2_grpc.IdentityServiceStub]:
    with grpc.insecure_channel(f"unix://{stack.layout.socket('identityd')}") as channel:
        yield identity_pb2_grpc.IdentityServiceStub(channel)


def set_rules(stack: Stack, **rules: object) -> None:
    with identityd(stack) as stub:
        now = stub.GetLabelRules(pb.GetLabelRulesRequest(), timeout=10, wait_for_ready=True)
        wanted = pb.LabelRules(revision=now.revision, namespace_quota=4096, **rules)
        stub.SetLabelRules(pb.SetLabelRulesRequest(rules=wanted), timeout=10, wait_for_ready=True)


def identities(stack: Stack) -> dict[str, int]:
    return {each["name"]: each["identity"] for each in stack.endpoints()}


def nodes_of(stack: Stack, number: int) -> list[str]:
    with identityd(stack) as stub:
        return list(
            stub.GetIdentity(
                pb.GetIdentityRequest(id=number), timeout=10, wait_for_ready=True
            ).nodes
        )


def test_new_label_rules_move_every_endpoint_without_a_packet_lost_or_let_through(
    stack: Stack, front: Namespace, api: Namespace, address: str
) -> None:
    stack.apply(POLICY)
    with (
        UdpStream(front, api, address, 7000) as allowed,
        UdpStream(front, api, address, 7001) as forbidden,
        Connections(front, api, address, 8080) as connections,
    ):
        for rules in ({"label_filter": ["!release$"]}, {}, {"policy_relevant": True}, {}):
            before = identities(stack)
            set_rules(stack, **rules)
            eventually(
                lambda was=before: all(n != was[name] for name, n in identities(stack).items()),
                "the endpoints keep their identities",
            )
            made = connections.made
            eventually(lambda count=made: connections.made > count + 20, "no new connections")
            for name, number in before.items():
                eventually(lambda old=number: nodes_of(stack, old) == [], f"{name}'s reference")
            for number in identities(stack).values():
                assert nodes_of(stack, number) == [stack.name]
    assert allowed.lost == 0
    assert forbidden.received == set()
    assert connections.failed == []


def test_a_known_label_set_is_attached_while_identityd_is_away_and_an_unknown_one_is_not(
    stack: Stack, front: Namespace, api: Namespace, address: str
) -> None:
    stack.apply(POLICY)
    was = identities(stack)["front"]
    stack.kill("identityd")
    with namespace("tsr-more") as more, namespace("tsr-new") as new, api.listen(8080):
        stack.add(more, "front-2", app="front", release="7")
        assert identities(stack)["front-2"] == was
        assert more.can_connect(address, 8080)
        with pytest.raises(TesseraError, match="identityd"):
            stack.add(new, "unknown", app="other")
        stack.start_process("identityd")
        stack.wait_ready()
        eventually(lambda: nodes_of(stack, was) == [stack.name], "the reference that was owed")
        stack.add(new, "unknown", app="other")
        assert more.can_connect(address, 8080)
