"""Policy distribution to many simulated nodes, beside a policyd that serialises for each of them.

Two control planes (etcd, policyd, simulated nodes each), used in turns; the other one is idle then.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import grpc
from tessera_wire.policy.v1 import policy_pb2 as pb
from tessera_wire.policy.v1 import policy_pb2_grpc

from services.runtime.config import EtcdConfig
from services.store.model import Put
from services.store.open import open_store
from services.store.txn import bulk_txn
from tests.bench import figures
from tests.fakes import cluster_keys as keys
from tests.fakes.fleet import Preset
from tests.fakes.plane import Plane
from tests.fakes.stack import eventually

NAIVE = "tests.bench.naive_policyd"
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Size:
    """`apps`: identities that nodes have endpoints of; `identities`: all."""

    nodes: int
    fleets: int = 1
    apps: int = 100
    endpoints: int = 2
    identities: int = 1000
    policies: int = 100
    addresses: int = 1000


class Bench:
    def __init__(self, name: str, size: Size, policyd: str = "") -> None:
        self.name, self.size = name, size
        self.plane = Plane.start("bench", identityds=0, policyd=policyd)
        asyncio.run(fill(self.plane.etcd, size))
        self._channel = grpc.insecure_channel(self.plane.target("policyd0"))
        self.admin = policy_pb2_grpc.PolicyAdminStub(self._channel)
        eventually(self._is_filled, "policyd has not seen it all", 120.0)

    def _is_filled(self) -> bool:
        status = self.admin.Status(pb.StatusRequest())
        return status.policies >= self.size.policies and status.identities >= self.size.identities

    def boot(self) -> float:
        """Seconds from the first node's start until all enforce."""
        share = self.size.nodes // self.size.fleets
        for number in range(self.size.fleets):
            self.plane.fleet(
                f"fleet{number}",
                share,
                first=number * share,
                preset=True,
                apps=self.size.apps,
                endpoints=self.size.endpoints,
            )
        eventually(self.all_enforce, f"{self.name}: not all enforce", 600.0)
        return max(state["enforced_s"] for state in self.states())

    def states(self) -> list[dict[str, float]]:
        return [fleet.ask("state") for fleet in self.plane.fleets.values()]

    def all_enforce(self) -> bool:
        time.sleep(0.2)
        states = self.states()
        return sum(state["enforcing"] for state in states) == self.size.nodes

    def change(self, port: int) -> tuple[list[float], float]:
        """Until each node has it in its tables; until all have acknowledged. Seconds."""
        text = keys.allow("bench", "sim-1", "sim-2", port, namespace="sim")
        started = time.perf_counter()
        applied = self.admin.Apply(pb.ApplyRequest(manifests=text.encode()))
        self.admin.WaitRealised(
            pb.WaitRealisedRequest(revision=applied.revision, timeout_ms=120_000)
        )
        acknowledged = time.perf_counter() - started
        times = [
            at - started
            for fleet in self.plane.fleets.values()
            for at in fleet.ask("times", applied.revision)
        ]
        assert len(times) == self.size.nodes, f"{len(times)} of {self.size.nodes} nodes"
        return times, acknowledged

    def restart(self) -> float:
        """Seconds from a new policyd's start until every node is connected to it."""
        self.plane.kill("policyd0")
        started = time.perf_counter()
        self.plane.run("policyd0")

        def back() -> bool:
            time.sleep(0.05)
            try:
                status = self.admin.Status(pb.StatusRequest(), wait_for_ready=True, timeout=5)
            except grpc.RpcError:
                return False
            return sum(node.connected for node in status.nodes) == self.size.nodes

        eventually(back, f"{self.name}: not all came back", 300.0)
        return time.perf_counter() - started

    def received(self) -> int:
        return int(sum(state["bytes"] for state in self.states()))

    def policyd(self) -> tuple[float, int]:
        """CPU seconds and resident bytes."""
        process = Path(f"/proc/{self.plane.processes['policyd0'].pid}")
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        resident = int((process / "statm").read_text().split()[1]) * PAGE
        return (int(fields[11]) + int(fields[12])) / TICKS, resident

    def stop(self) -> None:
        self._channel.close()
        self.plane.stop()


async def fill(etcd: list[str], size: Size) -> None:
    """Identities, addresses and policies, straight into the store."""
    items = [
        keys.identity(Preset.FIRST + n, keys.pod(f"sim-{n % size.apps}", namespace="sim"))
        if n < size.apps
        else keys.identity(
            Preset.FIRST + n, keys.pod(f"sim-{n % size.apps}", "sim", instance=f"i{n}")
        )
        for n in range(size.identities)
    ]
    items += [
        keys.address(f"10.9.{n >> 8}.{n & 255}", Preset.FIRST + n % size.apps)
        for n in range(size.addresses)
    ]
    items += [
        keys.policy(
            keys.allow(
                f"p{n}", f"sim-{n % size.apps}", f"sim-{(n + 7) % size.apps}", 1000 + n, "sim"
            ),
            16 + n,
        )
        for n in range(size.policies)
    ]
    items.append(("tessera/policy/next_rule", str(16 + size.policies).encode()))
    async with open_store(EtcdConfig(endpoints=tuple(etcd))) as store:
        for start in range(0, len(items), 500):
            await store.txn(bulk_txn((), [Put(k, v) for k, v in items[start : start + 500]]))


def pair(number: int, apps: int) -> str:
    subject, peer = f"sim-{number % apps}", f"sim-{(number + 7) % apps}"
    return keys.allow(f"p{number}", subject, peer, 1000 + number, "sim")


def propagation(size: Size, rounds: int, naive_rounds: int) -> None:
    benches = [Bench("shared log, what differs", size), Bench("naive", size, NAIVE)]
    try:
        empty = [bench.policyd()[1] for bench in benches]
        booted = [bench.boot() for bench in benches]
        realised: dict[str, list[float]] = defaultdict(list)
        cost: dict[str, list[tuple[float, int]]] = defaultdict(list)
        for number in range(rounds):
            for bench in benches:
                if bench.name == "naive" and number >= naive_rounds:
                    continue
                cpu, received = bench.policyd()[0], bench.received()
                times, acknowledged = bench.change(2000 + number)
                if number:
                    realised[f"{bench.name}: on each node"] += times
                    realised[f"{bench.name}: all acknowledged"].append(acknowledged)
                    used = bench.policyd()[0] - cpu, bench.received() - received
                    cost[bench.name].append(used)
                time.sleep(0.3)
        figures.table(f"one policy changed, {size.nodes} nodes", realised)
        for bench, before in zip(benches, empty, strict=True):
            used_cpu = statistics.median(c for c, _ in cost[bench.name])
            sent = statistics.median(b for _, b in cost[bench.name])
            stream = (bench.policyd()[1] - before) / size.nodes / 1024
            print(
                f"  {bench.name}: a change is {sent / 1024:.0f} KiB and"
                f" {used_cpu * 1000:.0f} ms of policyd's CPU; {stream:.0f} KiB resident a stream"
            )
        print(f"  until all enforced: {', '.join(f'{b:.1f} s' for b in booted)}")
        for bench in benches:
            received = bench.received()
            took = bench.restart()
            print(
                f"  {bench.name}: policyd killed and started, all connected after {took:.1f} s,"
                f" {(bench.received() - received) / 1024:.0f} KiB"
            )
    finally:
        for bench in benches:
            bench.stop()


def storm(size: Size) -> None:
    for name, module in (("shared log, what differs", ""), ("naive", NAIVE)):
        bench = Bench(name, size, module)
        try:
            took = bench.boot()
            cpu, resident = bench.policyd()
            print(
                f"boot storm, {name}: {size.nodes} nodes, {size.identities} identities,"
                f" {size.policies} policies, {size.addresses} addresses: all enforce after"
                f" {took:.1f} s; {bench.received() / 1e6:.1f} MB, policyd {cpu:.1f} s of CPU,"
                f" {resident / 1e6:.0f} MB   [{figures.load()}]",
                flush=True,
            )
        finally:
            bench.stop()


def main(rounds: int = 20) -> None:
    scale = float(os.environ.get("TESSERA_BENCH_SCALE", "1"))
    propagation(Size(int(1000 * scale)), rounds + 1, 4)
    storm(Size(int(1000 * scale), fleets=1, apps=1000, identities=10_000, policies=1000))
    if rounds >= 20:
        propagation(Size(int(5000 * scale), fleets=2), rounds // 2 + 1, 2)


if __name__ == "__main__":
    print(figures.machine())
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
