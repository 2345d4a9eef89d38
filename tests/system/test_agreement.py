"""Random policies: what the engine says, what the kernel's tables say, what packets meet."""

from __future__ import annotations

import json
import random
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from datapath.maps.layout import Endpoint, Verdict
from datapath.maps.tables import Tables
from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.policy.clauses import Direction, RuleId
from services.policy.compile import compile_direction
from services.policy.parse import parse
from services.policy.resolve import Resolver, ResolverSettings
from tests.fakes.kernel_lookup import judge
from tests.fakes.netns import Namespace
from tests.fakes.random_policies import random_policy
from tests.fakes.stack import Stack

pytestmark = pytest.mark.kernel

APPS = ("front", "api", "db")
PORTS = (8080, 8085, 9000)
TCP = socket.IPPROTO_TCP
# Loopback between namespaces answers in well under a millisecond; what is silent was dropped.
SILENCE_S = 0.4
Probe = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Pod:
    ns: Namespace
    ip: str
    identity: int


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    made = Stack.start("agree")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def pods(stack: Stack) -> Iterator[dict[str, Pod]]:
    with ExitStack() as cleanup:
        found = {}
        for app in APPS:
            ns = Namespace.create()
            cleanup.callback(ns.delete)
            ip = stack.add(ns, app, app=app)
            cleanup.callback(stack.remove, app)
            for port in PORTS:
                cleanup.enter_context(ns.listen(port))
            identity = next(e["identity"] for e in stack.endpoints() if e["name"] == app)
            found[app] = Pod(ns, ip, identity)
        yield found


def engine_verdicts(stack: Stack, pods: dict[str, Pod], manifests: list[str]) -> dict[Probe, bool]:
    resolver = Resolver(ResolverSettings(allow_localhost=False))
    listed = json.loads(stack.rest.all_of("/v1/identities", "identities"))["identities"]
    labels = {NumericIdentity(i["id"]): Labels.parse(i["labels"]) for i in listed if i["id"] > 255}
    resolver.set_identities(labels)
    for manifest in manifests:
        parsed = parse(manifest.encode(), "random", "default")
        assert not parsed.refused, parsed.problems
        resolver.set_policy(parsed.policies[0].policy, RuleId(16))

    def allows(of: Pod, peer: Pod, direction: Direction, port: int) -> bool:
        local = resolver.local_policy(NumericIdentity(of.identity))
        compiled = compile_direction(local, direction)
        if compiled is None:
            return True
        answers = compiled.partition(lambda group: resolver.group(group).members)
        own = [answer for answer, members in answers.items() if peer.identity in members]
        answer = own[0] if own else compiled.default
        return answer.lookup(TCP, port).verdict.name == "ALLOW"

    return {
        (source, sink, port): allows(pods[source], pods[sink], Direction.EGRESS, port)
        and allows(pods[sink], pods[source], Direction.INGRESS, port)
        for source, sink, port in probes()
    }


def probes() -> list[Probe]:
    return [(a, b, port) for a in APPS for b in APPS if a != b for port in PORTS]


def kernel_verdicts(stack: Stack, pods: dict[str, Pod]) -> dict[Probe, bool]:
    tables = Tables.pinned(stack.bpf_dir)
    rows: dict[int, Endpoint] = {row.identity: row for _, row in tables.endpoints.items()}

    def allows(source: Pod, sink: Pod, port: int) -> bool:
        out = judge(tables, rows[source.identity].slot_out, sink.identity, TCP, port)
        into = judge(tables, rows[sink.identity].slot_in, source.identity, TCP, port)
        return out[0] is Verdict.ALLOW and into[0] is Verdict.ALLOW

    found = {(a, b, port): allows(pods[a], pods[b], port) for a, b, port in probes()}
    tables.close()
    return found


def packet_verdicts(pods: dict[str, Pod]) -> dict[Probe, bool]:
    """All connections at once: what has not been answered when silence falls was dropped."""
    found = dict.fromkeys(probes(), False)
    with selectors.DefaultSelector() as waiting, ExitStack() as cleanup:
        for probe in found:
            source, sink, port = probe
            client = cleanup.enter_context(pods[source].ns.socket(socket.SOCK_STREAM))
            client.setblocking(False)
            client.connect_ex((pods[sink].ip, port))
            waiting.register(client, selectors.EVENT_WRITE, probe)
        end = time.perf_counter() + SILENCE_S
        while waiting.get_map() and (left := end - time.perf_counter()) > 0:
            for key, _ in waiting.select(left):
                assert isinstance(key.fileobj, socket.socket)
                found[key.data] = not key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                waiting.unregister(key.fileobj)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_engine_kernel_and_packets_agree(stack: Stack, pods: dict[str, Pod], seed: int) -> None:
    rng = random.Random(seed)
    manifests = [random_policy(rng, number, APPS) for number in range(rng.randint(1, 4))]
    try:
        stack.apply("\n---\n".join(manifests))
        expected = engine_verdicts(stack, pods, manifests)
        assert kernel_verdicts(stack, pods) == expected, manifests
        assert packet_verdicts(pods) == expected, manifests
    finally:
        for policy in json.loads(stack.rest.get("/v1/policies"))["policies"]:
            stack.withdraw(policy["kind"], policy["namespace"], policy["name"])
