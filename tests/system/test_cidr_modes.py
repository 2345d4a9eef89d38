"""CIDRs by the addresses of endpoints, or of the outside only: both readings, with real packets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.netns import Namespace, namespace
from tests.fakes.stack import POOL, Stack, eventually

pytestmark = pytest.mark.kernel

OUTSIDE = {"cidr_match": "cilium", "ipblock_match": "cilium"}
EVERYWHERE = {"cidr_match": "addresses", "ipblock_match": "addresses"}
BY_DEFAULT = {"cidr_match": "cilium", "ipblock_match": "addresses"}


@pytest.fixture(scope="module", params=["default", "outside", "everywhere"])
def modes(request: pytest.FixtureRequest) -> dict[str, str]:
    return {"default": BY_DEFAULT, "outside": OUTSIDE, "everywhere": EVERYWHERE}[request.param]


@pytest.fixture(scope="module")
def stack(modes: dict[str, str]) -> Iterator[Stack]:
    made = Stack.start("cidr", {} if modes is BY_DEFAULT else {"policyd": modes})
    yield made
    made.stop()


def ip_block(cidr: str, *without: str) -> str:
    return f"""
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: block, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{app: api}}}}
  ingress:
  - from: [{{ipBlock: {{cidr: {cidr}, except: [{", ".join(without)}]}}}}]
"""


def from_cidr(cidr: str) -> str:
    return f"""
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: cidr, namespace: shop}}
spec:
  endpointSelector: {{matchLabels: {{app: api}}}}
  ingress: [{{fromCIDR: [{cidr}]}}]
"""


def deny_cidr(cidr: str) -> str:
    return f"""
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: deny, namespace: shop}}
spec:
  endpointSelector: {{matchLabels: {{app: api}}}}
  enableDefaultDeny: {{ingress: false}}
  ingressDeny: [{{fromCIDR: [{cidr}]}}]
"""


def ip_of(stack: Stack, name: str) -> str:
    return str(next(e["ip"] for e in stack.endpoints() if e["name"] == name))


def test_a_cidr_around_endpoints_chooses_them_where_addresses_are_matched(
    stack: Stack, modes: dict[str, str], front: Namespace, api: Namespace, address: str
) -> None:
    with api.listen(8080):
        stack.apply(from_cidr(POOL))
        assert front.can_connect(address, 8080) == (modes["cidr_match"] == "addresses")
        stack.withdraw("CiliumNetworkPolicy", "shop", "cidr")
        stack.apply(ip_block(POOL))
        by_address = modes["ipblock_match"] == "addresses"
        assert front.can_connect(address, 8080) == by_address
        stack.apply(ip_block(POOL, f"{ip_of(stack, 'front')}/32"))
        assert not front.can_connect(address, 8080)
        stack.withdraw("NetworkPolicy", "shop", "block")
        assert front.can_connect(address, 8080)


def test_an_identity_on_both_sides_of_a_prefix_is_let_in_by_none_and_kept_out_by_any(
    stack: Stack, modes: dict[str, str], front: Namespace, api: Namespace, address: str
) -> None:
    """Endpoints with the same labels are one identity."""
    let_in = modes["ipblock_match"] == "addresses"
    kept_out = modes["cidr_match"] == "addresses"
    inside = f"{ip_of(stack, 'front')}/32"
    with api.listen(8080), namespace() as twin:
        stack.apply(ip_block(inside))
        assert front.can_connect(address, 8080) == let_in
        stack.add(twin, "twin", app="front")
        eventually(lambda: not front.can_connect(address, 8080), "front is still let in")
        assert not twin.can_connect(address, 8080)
        stack.withdraw("NetworkPolicy", "shop", "block")
        stack.apply(deny_cidr(inside))
        assert front.can_connect(address, 8080) != kept_out
        assert twin.can_connect(address, 8080) != kept_out
        stack.remove("twin")
        stack.withdraw("CiliumNetworkPolicy", "shop", "deny")
        stack.apply(ip_block(inside))
        eventually(lambda: front.can_connect(address, 8080) == let_in, "front is not judged anew")
        stack.withdraw("NetworkPolicy", "shop", "block")
