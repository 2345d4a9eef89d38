"""`policy explain` and `policy diff` against a running node say what packets then do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from services.cli.policy import app
from tests.fakes.netns import Namespace
from tests.fakes.stack import Stack, eventually

pytestmark = pytest.mark.kernel

ALLOW = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
  log: {value: "shop: api"}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
"""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    made = Stack.start("ask")
    yield made
    made.stop()


def ask(stack: Stack, *words: str) -> Any:
    run = CliRunner().invoke(app, [*words, "--server", stack.rest.address, "-o", "json"])
    assert run.exit_code == 0, (run.output, run.exception)
    return json.loads(run.stdout)


def test_an_explanation_is_what_packets_do(
    stack: Stack, front: Namespace, api: Namespace, address: str
) -> None:
    stack.apply(ALLOW)
    with api.listen(8080), api.listen(8081):
        for port in (8080, 8081):
            told = ask(stack, "explain", "shop/front", "shop/api", str(port))
            assert front.can_connect(address, port) == (told["verdict"] == "allow")
        (miss,) = told["ends"][1]["misses"]
        assert miss["lacks"] == "TCP port 8080 is allowed, you asked TCP port 8081"
        assert miss["rule"]["line"] == 8
        assert miss["rule"]["log"] == "shop: api"
        passed = eventually(lambda: stack.flows(last=50, verdict="FORWARDED"), "no flow is seen")
        assert any(flow["rule"].endswith('line 8 log "shop: api"') for flow in passed)
        flow = eventually(lambda: stack.flows(last=50, verdict="DROPPED"), "no drop is seen")[-1]
        assert told["ends"][1]["reason"] == flow["rule"]


def test_a_difference_over_seen_flows_is_what_applying_does(
    stack: Stack, front: Namespace, api: Namespace, address: str, tmp_path: Path
) -> None:
    candidate = tmp_path / "candidate.yaml"
    candidate.write_text(ALLOW.replace("8080", "9090"))
    stack.apply(ALLOW)
    with api.listen(8080):
        assert front.can_connect(address, 8080)
        eventually(lambda: stack.flows(last=50, verdict="FORWARDED"), "no flow is seen")
        agent = stack.agent.address
        found = ask(stack, "diff", "-f", str(candidate), "--agent-socket", agent)
        assert {(one["source"], one["target"], one["port"]) for one in found["denied"]} == {
            ("shop/front", "shop/api", "8080/TCP")
        }
        assert front.can_connect(address, 8080)
        stack.apply(candidate.read_text())
        assert not front.can_connect(address, 8080)
