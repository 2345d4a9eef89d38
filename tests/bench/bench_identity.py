"""New identities, from the request to identityd to their rows in the kernel.

    Allocate ──► identityd ──► etcd ──► policyd ──► agent ──► one peer row each
       ▲ first write              └ answered: the last write is acknowledged   ▲ row

Beside it, interleaved: for one identity an element added to an nft set (local, no store, no other
node); for a burst the same number of rows written into the same map, one system call each and
batched, with the answer known beforehand.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict

from datapath import bpfcall
from datapath.maps.layout import PeerFlags, PolicyPeer, PolicyPeerKey, Verdict
from tests.bench import figures
from tests.bench.bench_rule import run
from tests.bench.node import BenchNode, Identities, bench_node
from tests.fakes.netns import namespace

# A slot that nobody is judged by.
SCRATCH = 60_000


def allocated(node: BenchNode, identities: Identities, count: int) -> tuple[float, float, float]:
    """(request -> answered, request -> all rows, answered -> all rows); the last is 0 when the
    rows were there first."""
    request, numbers = identities.request(count)
    slot = node.slot_in()
    keys = [PolicyPeerKey(slot, number).pack() for number in numbers]
    acked: list[float] = []
    started = time.perf_counter()
    future = identities.send(request, acked)
    there = node.peers.await_all(keys)
    got = [result.identity for result in future.result().results]
    assert got == numbers, "identityd gave other numbers than asked for"
    while not acked:
        time.sleep(0.001)
    return acked[0] - started, there - started, max(there - acked[0], 0.0)


def written_alone(node: BenchNode, count: int) -> tuple[float, float]:
    """(one system call per row, batched)."""
    row = PolicyPeer(0, 16, 0, Verdict.ALLOW, PeerFlags(0))
    keys = [PolicyPeerKey(SCRATCH, 1000 + i) for i in range(count)]
    started = time.perf_counter()
    for key in keys:
        bpfcall.map_update(node.peers.fd, key.pack(), row.pack())
    one_by_one = time.perf_counter() - started
    node.tables.policy_peer.delete_many(keys)
    started = time.perf_counter()
    node.tables.policy_peer.put_many((key, row) for key in keys)
    batched = time.perf_counter() - started
    node.tables.policy_peer.delete_many(keys)
    return one_by_one, batched


def one(node: BenchNode, identities: Identities, rounds: int) -> None:
    samples: dict[str, list[float]] = defaultdict(list)
    nft = shutil.which("nft")
    with namespace("tsr-bench") as space:
        if nft:
            table = "add table inet bench { set s { type ipv4_addr; }; }"
            space.call(lambda: run([nft, table]))
        for i in range(rounds + 5):
            answered, rows, after = allocated(node, identities, 1)
            element = f"add element inet bench s {{ 10.9.{i >> 8}.{i & 255} }}"
            local = space.call(lambda e=element: run([nft, e])) if nft else None
            if i < 5:
                continue
            samples["request -> row"].append(rows)
            samples["request -> answered"].append(answered)
            samples["answered -> row"].append(after)
            if local is not None:
                samples["nft add element"].append(local)
    figures.table(f"one identity, {rounds} times", samples)


def burst(node: BenchNode, identities: Identities, count: int, rounds: int) -> None:
    samples: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        answered, rows, after = allocated(node, identities, count)
        one_by_one, batched = written_alone(node, count)
        samples["first write -> all rows"].append(rows)
        samples["first write -> last acknowledged"].append(answered)
        samples["last acknowledged -> all rows"].append(after)
        samples["rows alone, a system call each"].append(one_by_one)
        samples["rows alone, batched"].append(batched)
    figures.table(f"{count:,} identities at once, {rounds} times (they pile up)", samples)


def main(
    rounds: int = 200, bursts: tuple[tuple[int, int], ...] = ((1000, 10), (10_000, 4))
) -> None:
    with bench_node("identity") as node:
        identities = Identities(node.stack)
        try:
            one(node, identities, rounds)
            for count, times in bursts:
                burst(node, identities, count, times)
        finally:
            identities.close()


if __name__ == "__main__":
    print(figures.machine())
    main()
