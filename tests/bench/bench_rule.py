"""One rule, from the REST request to the row that enforces it.

    POST ──► apid ──► policyd ──► etcd ──► policyd ──► agent ──► slot built, endpoint flipped
      └── answered            └── wait answered (the node's ack)        └── row

A change of clauses builds a slot and flips the endpoint's row to it, so that row is the end. Beside
it, interleaved: `nft add rule` and `iptables-restore` of one rule (local, no store, no other node),
and one put into the same etcd by its own client library's shortest way, the floor of any path
through it.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections import defaultdict

import grpc
from tessera_wire.etcd import etcd_pb2, etcd_pb2_grpc

from datapath.maps.layout import PolicyPeerKey, PolicyPortKey, Verdict
from tests.bench import figures
from tests.bench.doors import until
from tests.bench.node import RULE, BenchNode, bench_node
from tests.fakes.netns import Namespace, namespace

TCP = 6


def changed(node: BenchNode, port: int) -> tuple[float, float, float]:
    """(answered, row, acknowledged) of one apply that gives the rule another port."""
    before = node.slot_in()
    seen: list[float | None] = [None, None]
    revision = 0
    started = time.perf_counter()
    node.rest.send("POST", "/v1/policies", RULE.replace("PORT", str(port)).encode())

    def both() -> bool:
        nonlocal revision
        if seen[1] is None and node.slot_in() != before:
            seen[1] = time.perf_counter()
        if seen[0] is None and (answer := node.rest.answered()) is not None:
            seen[0] = time.perf_counter()
            revision = answer["revision"]
            node.rest.send("GET", f"/v1/policies/wait?revision={revision}&timeout_s=30")
        return None not in seen

    until(both)
    assert node.rest.answer()["done"]
    acknowledged = time.perf_counter() - started
    peer = node.tables.policy_peer.get(PolicyPeerKey(node.slot_in(), node.client))
    assert peer is not None
    row = node.tables.policy_port.get(PolicyPortKey(peer.class_id, port, TCP))
    assert row is not None, f"port {port} has no row"
    assert row.verdict is Verdict.ALLOW
    answered, enforced = (at - started for at in seen if at is not None)
    return answered, enforced, acknowledged


def run(command: list[str], text: str | None = None) -> float:
    started = time.perf_counter()
    subprocess.run(command, input=text, text=True, check=True, capture_output=True)
    return time.perf_counter() - started


class LocalFilters:
    """nft and iptables, where they are there, in a network namespace of their own."""

    def __init__(self, space: Namespace) -> None:
        self._space = space
        self._nft = shutil.which("nft")
        self._restore = shutil.which("iptables-restore")
        if self._nft:
            self._run([self._nft, "add table inet bench { chain c { }; }"])
        if self._restore:
            self._run([self._restore, "--noflush"], "*filter\n:BENCH -\nCOMMIT\n")

    def one_rule(self, port: int) -> dict[str, float]:
        took: dict[str, float] = {}
        if self._nft:
            rule = f"add rule inet bench c tcp dport {port} accept"
            took["nft add rule"] = self._run([self._nft, rule])
        if self._restore:
            rule = f"*filter\n-A BENCH -p tcp --dport {port} -j ACCEPT\nCOMMIT\n"
            took["iptables-restore of one rule"] = self._run([self._restore, "--noflush"], rule)
        return took

    def _run(self, command: list[str], text: str | None = None) -> float:
        # A child belongs to the namespace of the thread that starts it.
        return self._space.call(lambda: run(command, text))


def main(rounds: int = 200) -> None:
    samples: dict[str, list[float]] = defaultdict(list)
    with bench_node("rule") as node, namespace("tsr-bench") as space:
        filters = LocalFilters(space)
        etcd = grpc.insecure_channel(f"127.0.0.1:{node.stack.etcd_port}")
        kv = etcd_pb2_grpc.KVStub(etcd)
        for port in range(1000, 1000 + rounds + 5):
            answered, enforced, acknowledged = changed(node, port)
            local = filters.one_rule(port)
            started = time.perf_counter()
            kv.Put(etcd_pb2.PutRequest(key=b"bench", value=b"x" * 500))
            put = time.perf_counter() - started
            if port < 1005:
                continue  # caches, imports, connections
            samples["apply -> row in the kernel"].append(enforced)
            samples["apply -> answered"].append(answered)
            samples["apply, then wait -> acknowledged"].append(acknowledged)
            for name, took in local.items():
                samples[name].append(took)
            samples["one put into the same etcd"].append(put)
        etcd.close()
    figures.table(f"one rule changed, {rounds} times", samples)


if __name__ == "__main__":
    print(figures.machine())
    main()
