"""Label rules changed under traffic; and a node that goes on attaching without identityd."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

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


RULES = "/v1/identities/rules"


def set_rules(stack: Stack, **rules: object) -> None:
    now = json.loads(stack.rest.get(RULES))
    headers = {"Content-Type": "application/json", "If-Match": f'"{now["revision"]}"'}
    answer = stack.rest.request("PUT", RULES, body=json.dumps(rules).encode(), headers=headers)
    assert json.loads(answer)["revision"] > now["revision"]


def identities(stack: Stack) -> dict[str, int]:
    return {each["name"]: each["identity"] for each in stack.endpoints()}


def nodes_of(stack: Stack, number: int) -> list[str]:
    """Those that hold a reference."""
    return list(json.loads(stack.rest.get(f"/v1/identities/{number}"))["nodes"])


def answers(stack: Stack) -> bool:
    try:
        return bool(stack.rest.get(RULES))
    except TesseraError:
        return False


def added(stack: Stack, space: Namespace) -> bool:
    """False while the agent still waits before it looks for identityd again."""
    try:
        return bool(stack.add(space, "unknown", app="other"))
    except TesseraError:
        return False


def refers(stack: Stack, number: int) -> bool:
    """False while identityd is just starting, too."""
    try:
        return nodes_of(stack, number) == [stack.name]
    except TesseraError:
        return False


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
        # The agent may not have noticed that it was away.
        eventually(lambda: answers(stack), "identityd does not come back", 60.0)
        eventually(lambda: refers(stack, was), "the reference that was owed")
        eventually(lambda: added(stack, new), "the endpoint that was refused")
        assert more.can_connect(address, 8080)


def test_rules_that_cannot_be_are_refused_and_change_nothing(stack: Stack) -> None:
    before = stack.rest.get(RULES)
    headers = {"Content-Type": "application/json"}
    for body, status, words in (
        ({"label_filter": ["!("]}, 422, "no regular expression"),
        ({"label_filter": ["!"]}, 422, "holds no pattern"),
        ({"label_filter": [""]}, 422, "holds no pattern"),
        ({"quota": 1}, 400, "quota"),
    ):
        reply = stack.rest.exchange("PUT", RULES, body=json.dumps(body).encode(), headers=headers)
        assert reply.status == status, reply
        assert words in reply.body.decode()
    stale = {**headers, "If-Match": '"1"'}
    assert stack.rest.exchange("PUT", RULES, body=b"{}", headers=stale).status == 412
    assert stack.rest.get(RULES) == before
