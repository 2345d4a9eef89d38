"""The whole node: manifests in by REST, packets judged between real namespaces."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from datapath.maps.tables import Tables
from services.policy.parse import parse
from tests.fakes.kernel_lookup import judge
from tests.fakes.netns import Namespace, namespace
from tests.fakes.stack import Stack, eventually

pytestmark = pytest.mark.kernel

ALLOW = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
"""
DENY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: keep-out, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
  ingressDeny:
  - fromEndpoints: [{matchLabels: {app: front}}]
"""
ISOLATE = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: isolate, namespace: shop}
spec:
  endpointSelector: {}
  ingress: [{}]
"""
BROKEN = ALLOW.replace('port: "8080"', 'port: "808000"').replace("name: api", "name: broken")
TCP = socket.IPPROTO_TCP


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    hasty = {"gc_grace_s": 1, "quarantine_s": 2, "pressed_quarantine_s": 1, "session_ttl_s": 5}
    made = Stack.start("walk", {"identityd": hasty, "ipamd": {"release_cooldown_s": 1}})
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def no_policies(stack: Stack) -> Iterator[None]:
    yield
    for policy in json.loads(stack.rest.get("/v1/policies"))["policies"]:
        stack.withdraw(policy["kind"], policy["namespace"], policy["name"])


def test_a_policy_applied_over_rest_judges_packets(
    stack: Stack, front: Namespace, api: Namespace, address: str
) -> None:
    with api.listen(8080), api.listen(8081):
        assert front.can_connect(address, 8081)
        stack.apply(ALLOW)
        assert front.can_connect(address, 8080)
        assert not front.can_connect(address, 8081)


def test_deny_wins_in_whatever_order_policies_come(
    stack: Stack, front: Namespace, api: Namespace, address: str
) -> None:
    with api.listen(8080):
        for order in ((ALLOW, DENY), (DENY, ALLOW)):
            for manifest in order:
                stack.apply(manifest)
            assert not front.can_connect(address, 8080)
            stack.withdraw("CiliumNetworkPolicy", "shop", "keep-out")
            assert front.can_connect(address, 8080)
            stack.withdraw("CiliumNetworkPolicy", "shop", "api")


def test_a_removed_allow_cuts_a_live_connection_on_its_next_forward_packet(
    stack: Stack, front: Namespace, api: Namespace, address: str
) -> None:
    stack.apply(ALLOW)
    stack.apply(ISOLATE)
    with api.listen(8080) as listener, front.connect(address, 8080) as client:
        server, _ = listener.accept()
        with server:
            client.sendall(b"before")
            assert server.recv(16) == b"before"
            stack.withdraw("CiliumNetworkPolicy", "shop", "api")
            server.settimeout(0.7)
            client.sendall(b"after")
            with pytest.raises(TimeoutError):
                server.recv(16)
            # Its replies stopped with it: nothing the server sends arrives any more.
            client.settimeout(0.7)
            server.sendall(b"reply")
            with pytest.raises(TimeoutError):
                client.recv(16)


def test_every_drop_names_the_rule_or_the_policies_that_isolate(
    stack: Stack, front: Namespace, api: Namespace, address: str
) -> None:
    with api.listen(8080), api.listen(8081):
        stack.apply(ALLOW)
        assert not front.can_connect(address, 8081, timeout_s=0.2)
        stack.apply(DENY)
        assert not front.can_connect(address, 8080, timeout_s=0.2)

    def rules() -> dict[int, str]:
        return {
            flow["destination"]["port"]: flow["rule"]
            for flow in stack.flows(verdict="DROPPED", last="50")
            if flow["destination"]["ip"] == address
        }

    found = eventually(lambda: r if {8080, 8081} <= (r := rules()).keys() else None, "no flows")
    assert "CiliumNetworkPolicy shop/keep-out" in found[8080]
    assert "ingressDeny[0]" in found[8080]
    assert found[8081].startswith("default deny")
    assert "CiliumNetworkPolicy shop/api" in found[8081]


def test_a_refused_document_leaves_all_of_the_input_unapplied(
    stack: Stack, front: Namespace, api: Namespace, address: str
) -> None:
    reply = stack.rest.exchange("POST", "/v1/policies", body=f"{ALLOW}---{BROKEN}".encode())
    assert reply.status == 422
    problem = json.loads(reply.body)["problems"][0]
    assert problem["policy"]["name"] == "broken"
    assert problem["path"].endswith("ports[0].port")
    assert problem["line"] > 0
    assert json.loads(stack.rest.get("/v1/policies"))["policies"] == []
    with api.listen(8081):
        assert front.can_connect(address, 8081)


def test_what_the_kernel_holds_is_what_packets_meet(
    stack: Stack, front: Namespace, api: Namespace, address: str
) -> None:
    stack.apply(ALLOW)
    stack.apply(DENY.replace("keep-out", "one-port") + '    toPorts: [{ports: [{port: "9000"}]}]\n')
    ports = (8080, 8081, 9000)
    rows = {e["name"]: e for e in stack.endpoints()}
    tables = Tables.pinned(stack.bpf_dir)
    endpoint = next(r for _, r in tables.endpoints.items() if r.id == rows["api"]["id"])
    listeners = [api.listen(port) for port in ports]
    for port in ports:
        verdict, _ = judge(tables, endpoint.slot_in, rows["front"]["identity"], TCP, port)
        assert (verdict.name == "ALLOW") == front.can_connect(address, port)
    for listener in listeners:
        listener.close()
    tables.close()


def test_a_deleted_endpoint_leaves_no_row_link_file_or_key(stack: Stack) -> None:
    pins = stack.bpf_dir / "links"
    before = set(os.listdir(pins)) if pins.exists() else set()
    tables = Tables.pinned(stack.bpf_dir)
    with namespace() as ns:
        address = stack.add(ns, "gone", app="only-here")
        identity = next(e["identity"] for e in stack.endpoints() if e["name"] == "gone")
        stack.apply(ALLOW.replace("app: api", "app: only-here"))
        outer = next(e["interface"] for e in stack.endpoints() if e["name"] == "gone")
        assert outer in subprocess.check_output(["ip", "link"], text=True)
        stack.remove("gone")
        assert outer not in subprocess.check_output(["ip", "link"], text=True)
        assert '"eth0"' not in ns.ip("-j link")
    assert [row for _, row in tables.endpoints.items() if row.identity == identity] == []
    packed = int.from_bytes(socket.inet_aton(address), "big")
    assert tables.local4.get(packed) is None
    assert tables.ipcache4.get(packed) is None
    eventually(
        lambda: not list(tables.policy_peer.items()),
        "policy rows of the gone endpoint stay",
    )
    assert dict(tables.policy_port.items()) == {}
    tables.close()
    assert (set(os.listdir(pins)) if pins.exists() else set()) == before

    def leftovers() -> list[str]:
        keys = stack.etcd_keys()
        padded = ".".join(f"{int(part):03}" for part in address.split("."))
        named = (address, padded, str(identity), "shop/gone")
        return [k for k in keys if any(n in k for n in named) and "/tomb/" not in k]

    # The number itself goes once its grace is over, the address's cool-down with its lease.
    eventually(lambda: not leftovers() or None, f"{leftovers()} stay", 60.0)


def test_applying_waits_for_the_node_or_says_why_not(stack: Stack) -> None:
    command = [sys.executable, "-m", "services.cli.main"]
    server = ["--server", stack.rest.address]
    manifest = ALLOW.replace("name: api", "name: waited")
    done = subprocess.run(
        [*command, "policy", "apply", *server, "--wait", "-f", "-"],
        input=manifest,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    stack.kill("agent")
    try:
        late = subprocess.run(
            [*command, "policy", "apply", *server, "--wait", "--timeout", "1s", "-f", "-"],
            input=manifest.replace("8080", "8088"),
            capture_output=True,
            text=True,
            timeout=30,
        )
    finally:
        stack.start_process("agent")
        stack.wait_ready()
    assert late.returncode == 1
    assert stack.name in late.stderr


def test_the_manifest_comes_back_as_it_was_written(stack: Stack) -> None:
    written = f"# why this exists\n{ALLOW.lstrip()}"
    stack.apply(written)
    listed = json.loads(stack.rest.get("/v1/policies", {"name": "api"}))["policies"]
    assert "# why this exists" in listed[0]["manifest"]
    assert not parse(listed[0]["manifest"].encode(), "stored", "shop").refused
