"""Random policies on two nodes: what is explained, what the maps say, what packets meet."""

from __future__ import annotations

import json
import os
import random
import selectors
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from datapath.maps.layout import Endpoint, Verdict
from datapath.maps.tables import Tables
from tests.fakes.cluster import Cluster, Pod
from tests.fakes.kernel_lookup import identity_of, judge
from tests.fakes.netns import icmp_echo
from tests.fakes.random_policies import random_policy

pytestmark = pytest.mark.kernel

APPS = ("front", "api", "db", "log")
TCP_PORTS = (8080, 8085, 9000)
UDP_PORT = 9000
ECHO = 8
TCP, UDP, ICMP = socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_ICMP
# Between namespaces of one machine an answer takes well under a millisecond.
SILENCE_S = 0.5
ROUNDS = int(os.environ.get("TESSERA_AGREEMENT_ROUNDS", "6"))
Probe = tuple[str, str, int, int]
"""Source, target, protocol, port (of ICMP the type)."""


@pytest.fixture(scope="module")
def pods(cluster: Cluster) -> Iterator[dict[str, Pod]]:
    for number, app in enumerate(APPS):
        cluster.add_pod(cluster.nodes[number % 2], app, app=app)
    cluster.settled()
    with ExitStack() as cleanup:
        for pod in cluster.pods:
            for port in TCP_PORTS:
                cleanup.enter_context(pod.ns.listen(port))
        yield {pod.name: pod for pod in cluster.pods}


def probes() -> list[Probe]:
    kinds = [*((TCP, port) for port in TCP_PORTS), (UDP, UDP_PORT), (ICMP, ECHO)]
    return [(a, b, *kind) for a in APPS for b in APPS if a != b for kind in kinds]


def explained(cluster: Cluster) -> dict[Probe, bool]:
    names = {TCP: "TCP", UDP: "UDP", ICMP: "ICMP"}

    def allowed(source: str, target: str, proto: int, port: int) -> bool:
        ends = {"source": f"shop/{source}", "target": f"shop/{target}"}
        query = ends | {"port": f"{port}/{names[proto]}"}
        answer = json.loads(cluster.plane.rest.get("/v1/policies/explain", query))
        return bool(answer["verdict"] == "allow")

    return {probe: allowed(*probe) for probe in probes()}


def in_maps(cluster: Cluster, pods: dict[str, Pod]) -> dict[Probe, bool]:
    tables = {node.name: Tables.pinned(node.bpf_dir) for node in cluster.nodes}
    rows: dict[str, Endpoint] = {
        name: next(r for _, r in tables[pod.node.name].endpoints.items() if r.id == pod.id)
        for name, pod in pods.items()
    }

    def allowed(source: str, target: str, proto: int, port: int) -> bool:
        def says(judge_of: str, peer: str, slot: int) -> bool:
            held = tables[pods[judge_of].node.name]
            address = int.from_bytes(socket.inet_aton(pods[peer].ip), "big")
            return judge(held, slot, identity_of(held, address), proto, port)[0] is Verdict.ALLOW

        return says(source, target, rows[source].slot_out) and says(
            target, source, rows[target].slot_in
        )

    found = {probe: allowed(*probe) for probe in probes()}
    for each in tables.values():
        each.close()
    return found


def on_packets(pods: dict[str, Pod]) -> dict[Probe, bool]:
    """All at once: what nobody has answered when silence falls was dropped."""
    found = dict.fromkeys(probes(), False)
    with selectors.DefaultSelector() as waiting, ExitStack() as cleanup:
        sinks = {name: cleanup.enter_context(pod.ns.udp(UDP_PORT)) for name, pod in pods.items()}
        pings = {
            name: cleanup.enter_context(pod.ns.socket(socket.SOCK_RAW, ICMP))
            for name, pod in pods.items()
        }
        for name in pods:
            waiting.register(sinks[name], selectors.EVENT_READ, ("udp", name))
            waiting.register(pings[name], selectors.EVENT_READ, ("icmp", name))
        for number, probe in enumerate(found):
            source, target, proto, port = probe
            if proto == TCP:
                client = cleanup.enter_context(pods[source].ns.socket(socket.SOCK_STREAM))
                client.setblocking(False)
                client.connect_ex((pods[target].ip, port))
                waiting.register(client, selectors.EVENT_WRITE, probe)
            elif proto == UDP:
                sender = cleanup.enter_context(pods[source].ns.udp())
                sender.sendto(str(number).encode(), (pods[target].ip, port))
            else:
                pings[source].sendto(icmp_echo(number), (pods[target].ip, 0))
        listed = list(found)
        end = time.perf_counter() + SILENCE_S
        while (left := end - time.perf_counter()) > 0:
            for key, _ in waiting.select(left):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if key.data[0] == "udp":
                    found[listed[int(sock.recv(16))]] = True
                elif key.data[0] == "icmp":
                    kind, ident = echo_of(sock.recv(256))
                    if kind == 0:
                        found[listed[ident]] = True
                else:
                    found[key.data] = not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    waiting.unregister(sock)
    return found


def echo_of(packet: bytes) -> tuple[int, int]:
    """Type and id of an ICMP message behind its IP header."""
    icmp = packet[(packet[0] & 15) * 4 :]
    return icmp[0], int(struct.unpack("!H", icmp[4:6])[0])


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_explain_maps_and_packets_agree(cluster: Cluster, pods: dict[str, Pod], seed: int) -> None:
    rng = random.Random(1000 + seed)
    manifests = [random_policy(rng, number, APPS) for number in range(rng.randint(1, 4))]
    try:
        cluster.apply(*manifests)
        said = explained(cluster)
        assert in_maps(cluster, pods) == said, manifests
        assert on_packets(pods) == said, manifests
    finally:
        cluster.clear_policies()
