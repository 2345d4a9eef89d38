"""Events from the kernel's ring to explained flows, per second of one core.

    python -m tests.bench.bench_events

A program writes a record per run (BPF_PROG_TEST_RUN of a forged packet) on another core while the
agent's own drain takes them out. Beside it, on the same ring: every record unpacked into an event
of its own and explained alone, which is what drained records cost before they were grouped. Rounds
of both alternate. Rates are per second of the drain's own CPU time; `lost` is the kernel's count.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from datapath.agent.events import DRAIN_LIMIT
from datapath.agent.explain import Explainer, Names
from datapath.agent.record import EndpointRecord, State
from datapath.agent.view import Address, Update, View
from datapath.maps.layout import METRIC_LOST, EventType, Verdict
from datapath.maps.ring import EventRing, Records
from tests.bench import figures
from tests.fakes.kernel_node import SMALL, KernelNode
from tests.fakes.packets import udp_packet

ROUNDS = 5
ROUND_S = 2.0
PER_RUN = 20_000
PAUSE_S = 0.02
RING_BYTES = 16 << 20
TOLD = (Verdict.ALLOW, Verdict.REDIRECT)


class Ways:
    """The two, each from drained records to explanations; how many flows there were."""

    def __init__(self, node: KernelNode) -> None:
        view = View()
        known = (Address(w.ip, w.identity, "n1", "shop", f"web{w.id}") for w in node.workloads)
        view.apply([Update(1, addresses=tuple(known))])
        records = tuple(
            EndpointRecord(
                w.id, "shop", f"web{w.id}", (), "", "", w.outer, State.READY,
                identity=w.identity, address=int(w.address),
            )
            for w in node.workloads
        )  # fmt: skip
        self._explainer = Explainer(view, lambda: records)
        self._names = Names(view, records)

    def grouped(self, drained: Records) -> int:
        return len(self._explainer.explain(drained))

    def one_by_one(self, drained: Records) -> int:
        flows = [one for one in drained if one.type == EventType.DROP or one.verdict in TOLD]
        return len(self._names.explained(flows))


@contextmanager
def produced(node: KernelNode) -> Iterator[None]:
    """Records arrive while the block runs, from every workload."""
    packets = [(w, udp_packet(w, node.workloads[0], 4000, 53)) for w in node.workloads[1:]]
    stop = threading.Event()

    def produce() -> None:
        while not stop.is_set():
            for workload, packet in packets:
                # Unmarked, its source is forged: dropped with an event, whatever the policy.
                node.run(workload, packet, program="to_endpoint", repeat=PER_RUN)

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def rate(ring: EventRing, how: Callable[[Records], int], round_s: float) -> float:
    """Records per second of this thread's CPU time. As in the agent, nobody looks all the time."""
    count = 0
    began, cpu = time.perf_counter(), time.thread_time()
    while time.perf_counter() - began < round_s:
        drained = ring.drain(DRAIN_LIMIT)
        count += len(drained)
        how(drained)
        if len(drained) < DRAIN_LIMIT:
            time.sleep(PAUSE_S)
    return count / (time.thread_time() - cpu)


def lost(node: KernelNode) -> int:
    row = node.tables.metrics.get(METRIC_LOST)
    return row.packets if row else 0


def main(rounds: int = ROUNDS, round_s: float = ROUND_S) -> None:
    node = KernelNode.start("bench-events", sizes=replace(SMALL, events_bytes=RING_BYTES))
    try:
        for number in range(8):
            node.add(f"10.78.0.{11 + number}", 1001 + number)
        both = Ways(node)
        ways = {"grouped": both.grouped, "one by one": both.one_by_one}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        missing: dict[str, list[float]] = {name: [] for name in ways}
        with produced(node):
            for _ in range(rounds):
                for name, how in ways.items():
                    before = lost(node)
                    rates[name].append(rate(node.datapath.ring, how, round_s))
                    missing[name].append((lost(node) - before) / round_s)
        print(f"\nevents drained and explained while produced   [{figures.load()}]")
        for name, found in rates.items():
            print(
                f"  {name:11} {statistics.median(found) / 1e6:6.2f} M per CPU second "
                f"(of {len(found)}: {min(found) / 1e6:.2f} to {max(found) / 1e6:.2f}), "
                f"lost {statistics.median(missing[name]) / 1e6:.2f} M/s"
            )
        ratio = statistics.median(rates["grouped"]) / statistics.median(rates["one by one"])
        print(f"  ratio {ratio:.1f}")
    finally:
        node.stop()


if __name__ == "__main__":
    main()
