"""Requests against L7 rules, on paper."""

from __future__ import annotations

import pytest

from services.policy.features import Features
from services.policy.l7 import ProxyRule, merge
from services.policy.parse import parse
from services.policy.questions import Ports
from services.policy.requests import Request, passes
from services.policy.stage import Stage, read_endpoints
from services.runtime.errors import Invalid

GET = ProxyRule("http", ('{"method":"GET","path":"/cart(/.*)?"}',))
NAMES = ProxyRule("dns", ('{"name":"*.example.com"}',))
ENDPOINTS = b"""
endpoints:
- {name: front, namespace: shop, labels: {app: front}}
- {name: web, namespace: shop, labels: {app: web}}
"""
POLICY = b"""
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress:
  - toPorts:
    - ports: [{port: "80", protocol: TCP}]
      rules: {http: [{method: GET}, {host: admin.example, path: "/a.*"}]}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET /cart", True),
        ("get /cart/7", True),
        ("GET /carts", False),
        ("POST /cart", False),
        ("dns api.example.com", None),
    ],
)
def test_a_request_passes_by_any_rule_of_its_kind(text, expected):
    assert passes(merge([GET]), Request.parse(text)) is expected


def test_names_and_a_clause_without_rules_let_through():
    assert passes(merge([NAMES]), Request.parse("dns API.example.com.")) is True
    assert passes(merge([NAMES]), Request.parse("dns example.org")) is False
    assert passes(merge([GET, None]), Request.parse("POST /anything")) is True


def test_a_rule_about_headers_asks_for_what_is_not_told():
    rule = ProxyRule("http", ('{"headers":["X-Token"],"method":"GET"}',))
    assert passes(merge([rule]), Request.parse("GET /")) is False


@pytest.mark.parametrize("text", ["", "GET", "GET path", "/path", "dns", "G3T /"])
def test_what_is_no_request_is_refused(text):
    with pytest.raises(Invalid, match="GET /path"):
        Request.parse(text)


@pytest.mark.parametrize(
    ("text", "passing"),
    [("GET /", True), ("PUT /", False), ("PUT http://admin.example/all", True)],
)
def test_an_explanation_says_what_the_proxy_would_do(text, passing):
    (read,) = parse(POLICY, "test", "shop", Features.ALL).policies
    stage = Stage(read_endpoints(ENDPOINTS, "endpoints"), [read.policy])
    _, ingress = stage.questions.explain(
        "shop/front", "shop/web", Ports(6, 80), Request.parse(text)
    )
    assert ingress.request_passes is passing
    assert ("does not let" in ingress.words) is not passing
