"""Identities by themselves: identityd and etcd, without a node.

    callers ──► allocator ──► etcd        in one process: what the design costs
    callers ══gRPC══► identityd ──► etcd  as processes, one and two replicas

Beside it, interleaved: each transaction alone, and allocation under locks (lock_allocation.py).
All of it shares the machine's cores, the callers included.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import uvloop
from tessera_wire.identity.v1 import identity_pb2 as pb

from services.identityd.allocator import Allocated, Item
from services.identityd.gc import Collector
from services.identityd.main import COLLECT_EVERY
from services.identityd.rules import LabelRules
from services.runtime.clock import SystemClock
from services.runtime.etcd_process import EmbeddedEtcd
from services.store.open import open_store
from services.wire.client import call
from tests.bench import figures
from tests.bench.lock_allocation import LockedAllocation
from tests.fakes.etcd import config
from tests.fakes.identity_churn import Replica, stubs_of, until_it_answers
from tests.fakes.identity_replica import Replica as Parts
from tests.fakes.identity_replica import replica, until

# Room for all rounds: 16 bits would be full after some seconds.
WIDE = range(1 << 20, 1 << 24)
NO_QUOTA = LabelRules(namespace_quota=0, warn_values=1 << 30)
# A loaded machine takes its time to read what earlier rounds have left.
SETTINGS: dict[str, Any] = {"numbers": WIDE, "label_rules": NO_QUOTA, "sync_wait_s": 60.0}
PER_CALL = 64
_ids = itertools.count()

Work = Callable[[], Awaitable[int]]


@dataclass(slots=True)
class Samples:
    """Of one way of doing it at one concurrency."""

    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)


def labels() -> tuple[str, ...]:
    """Of a set that is new; three labels, as a small workload has."""
    i = next(_ids)
    return (f"k8s:app=app{i}", f"k8s:io.kubernetes.pod.namespace=ns{i % 50}", "k8s:tier=web")


async def run(work: Work, concurrency: int, seconds: float, into: Samples) -> None:
    """`work` answers how many identities it allocated."""
    done = 0
    start = time.perf_counter()

    async def caller() -> None:
        nonlocal done
        while (began := time.perf_counter()) < start + seconds:
            allocated = await work()
            done += allocated
            into.latencies.append(time.perf_counter() - began)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(caller())
    into.rates.append(done / (time.perf_counter() - start))


def show(title: str, rows: dict[str, Samples]) -> None:
    """The ratio is of each line's rate to the first's."""
    first = statistics.median(next(iter(rows.values())).rates)
    width = max(map(len, rows))
    print(f"\n{title}   [{figures.load()}]")
    print(f"  {'':{width}}  {'per s':>8} {'p50 ms':>8} {'p99 ms':>8} {'ratio':>6}")
    for name, samples in rows.items():
        rate = statistics.median(samples.rates)
        p50, p99 = (figures.quantile(samples.latencies, q) * 1000 for q in (0.5, 0.99))
        print(f"  {name:{width}}  {rate:8.0f} {p50:8.1f} {p99:8.1f} {rate / first:6.2f}")
    sys.stdout.flush()


# ------------------------------------------------------------------ in one process


async def in_process(endpoint: str, rounds: int, seconds: float, levels: Sequence[int]) -> None:
    async with AsyncExitStack() as stack:
        works: dict[str, Work] = {}
        for name, width, workers in (("batched", 64, 4), ("each transaction alone", 1, 512)):
            store = await stack.enter_async_context(open_store(config(endpoint)))
            made = await stack.enter_async_context(
                replica(
                    store,
                    SystemClock(),
                    **SETTINGS,
                    width=width,
                    workers=workers,
                )
            )
            works[name] = _allocating(made, await made.open())
        store = await stack.enter_async_context(open_store(config(endpoint)))
        locked = LockedAllocation(store, await store.grant(3600), random.Random(1))

        async def under_locks() -> int:
            await locked.allocate(";".join(labels()))
            return 1

        works["under a lock for each set"] = under_locks
        for concurrency in levels:
            rows: dict[str, Samples] = defaultdict(Samples)
            for _ in range(rounds):
                for name, work in works.items():
                    await run(work, concurrency, seconds, rows[name])
            show(f"new sets, {concurrency} callers, in one process", rows)


def _allocating(made: Parts, lease: int) -> Work:
    async def work() -> int:
        [result] = await made.allocator.allocate("node-a", lease, [Item(labels())])
        assert isinstance(result, Allocated), result
        return 1

    return work


async def contended(endpoint: str, rounds: int, seconds: float) -> None:
    """Two replicas, 128 callers, 1000 sets that others are creating at the same time."""
    async with (
        open_store(config(endpoint)) as store,
        open_store(config(endpoint)) as other_store,
        replica(store, SystemClock(), **SETTINGS) as one,
        replica(other_store, SystemClock(), seed=1, **SETTINGS) as other,
    ):
        leases = [await one.open("node-a"), await other.open("node-b")]
        rows: dict[str, Samples] = defaultdict(Samples)
        chooser = random.Random(3)
        for _ in range(rounds):
            sets = [labels() for _ in range(1000)]
            turn = itertools.cycle([(one, leases[0], "node-a"), (other, leases[1], "node-b")])

            async def work(turn=turn, sets=sets) -> int:
                made, lease, node = next(turn)
                await made.allocator.allocate(node, lease, [Item(chooser.choice(sets))])
                return 1

            await run(work, 128, seconds, rows["two replicas, the same 1000 sets"])
        conflicts = one.counts.conflicts + other.counts.conflicts
        show(f"contended sets, 128 callers ({conflicts} transactions lost and repeated)", rows)


async def collecting(endpoint: str, count: int) -> None:
    async with (
        open_store(config(endpoint)) as store,
        replica(store, SystemClock(), **SETTINGS) as one,
    ):
        lease = await one.open()
        items = [Item(labels()) for _ in range(count)]
        for start in range(0, count, 1000):
            await one.allocator.allocate("node-a", lease, items[start : start + 1000])
        await until(lambda: one.view.in_use >= count, "the view", 60)
        collector = Collector(
            store,
            one.view,
            one.counts,
            SystemClock(),
            random.Random(1),
            grace_s=0.0,
            quarantine_s=1800.0,
            session_ttl_s=0.01,
        )
        await store.revoke(lease)
        await until(lambda: one.view.references == 0, "the references", 60)
        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(collector.run())
            await until(lambda: one.counts.collected >= count, "collection", 120)
            took = time.perf_counter() - started
            running.cancel()
        print(f"\ncollected {count:,} identities: {count / took:,.0f} per s   [{figures.load()}]")


async def reading(endpoint: str, count: int, followers: int) -> None:
    """Another replica reads all, a client lists all; then changes reach many followers."""
    async with (
        open_store(config(endpoint)) as store,
        replica(store, SystemClock(), **SETTINGS) as one,
    ):
        lease = await one.open()
        missing = max(0, count - one.view.in_use)
        for _ in range(0, missing, 1000):
            items = [Item(labels()) for _ in range(min(1000, missing))]
            await one.allocator.allocate("node-a", lease, items)
        await until(lambda: one.view.in_use >= count, "the view", 60)
        started = time.perf_counter()
        listed = len((await store.list("cilium/state/identities/v1/id/")).items)
        read = time.perf_counter() - started
        async with replica(store, SystemClock(), seed=2, **SETTINGS):
            synced = time.perf_counter() - started - read
        print(
            f"\n{listed:,} identities: listed from etcd in {read:.2f} s, a replica has read them"
            f" and their index and references in {synced:.2f} s   [{figures.load()}]"
        )
        await _fan_out(one, lease, followers, 5000)


async def _fan_out(one: Parts, lease: int, followers: int, changes: int) -> None:
    start = one.view.revision
    left = [2 * changes] * followers

    async def follow(at: int) -> None:
        async for batch in one.view.feed.follow(start):
            left[at] -= len(batch)
            if left[at] <= 0:
                return

    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for at in range(followers):
            tasks.create_task(follow(at))
        for _ in range(0, changes, 500):
            await one.allocator.allocate("node-a", lease, [Item(labels()) for _ in range(500)])
        written = time.perf_counter() - began
    took = time.perf_counter() - began
    print(
        f"{changes:,} creations and references told to {followers} followers: the last has all"
        f" {1000 * (took - written):.0f} ms after the last answer,"
        f" {2 * changes * followers / took:,.0f} changes per s   [{figures.load()}]"
    )


# ------------------------------------------------------------------ over gRPC


async def as_processes(
    endpoint: str, folder: Path, rounds: int, seconds: float, levels: Sequence[int]
) -> None:
    settings = (
        'namespace_quota = 0\nwarn_values = 1000000\ncluster_id = 9\n[log]\nlevel = "warning"\n'
    )
    replicas = [Replica(folder, f"r{i}", endpoint, settings) for i in range(2)]
    for each in replicas:
        await each.start()
    try:
        async with stubs_of(replicas) as (one, two, _):
            leases = []
            for node, stub in (("bench-a", one), ("bench-b", two)):
                await until_it_answers(stub)
                request = pb.OpenSessionRequest(node=node, ttl_s=3600)
                session = await call(stub.OpenSession, request, deadline_s=5.0)
                leases.append(session.lease)
            ways = {
                "1 replica, a set per call": ([(one, "bench-a", leases[0])], 1),
                "2 replicas, a set per call": (
                    [(one, "bench-a", leases[0]), (two, "bench-b", leases[1])],
                    1,
                ),
                f"1 replica, {PER_CALL} per call": ([(one, "bench-a", leases[0])], PER_CALL),
            }
            for concurrency in levels:
                rows: dict[str, Samples] = defaultdict(Samples)
                for _ in range(rounds):
                    for name, (doors, per_call) in ways.items():
                        callers = max(1, concurrency // per_call)
                        await run(_calling(doors, per_call), callers, seconds, rows[name])
                show(f"over gRPC, {concurrency} sets asked for at once", rows)
    finally:
        for each in replicas:
            await each.kill()


def _calling(doors: Sequence[tuple[object, str, int]], per_call: int) -> Work:
    turn: Iterator[tuple[object, str, int]] = itertools.cycle(doors)

    async def work() -> int:
        stub, node, lease = next(turn)
        items = [pb.AllocateItem(labels=pb.LabelSet(labels=labels())) for _ in range(per_call)]
        request = pb.AllocateRequest(node=node, lease=lease, items=items)
        answer = await call(stub.Allocate, request, deadline_s=30.0)
        problem = answer.results[0].problem.message
        assert answer.results[0].identity, problem
        return per_call

    return work


# ------------------------------------------------------------------ all of it


def quiet() -> None:
    """One line for each identity would be measured, too; identityd has its own log level."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


async def bench(
    rounds: int, seconds: float, levels: Sequence[int], identities: int, followers: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with EmbeddedEtcd(Path(folder) / "one") as etcd:
            await in_process(etcd.endpoint, rounds, seconds, levels)
            await contended(etcd.endpoint, rounds, seconds)
        async with EmbeddedEtcd(Path(folder) / "two") as etcd:
            await collecting(etcd.endpoint, identities // 4)
        async with EmbeddedEtcd(Path(folder) / "three") as etcd:
            await reading(etcd.endpoint, identities, followers)
        async with EmbeddedEtcd(Path(folder) / "four") as etcd:
            await as_processes(etcd.endpoint, Path(folder), rounds, seconds, levels)


def main(
    rounds: int = 3,
    seconds: float = 2.0,
    levels: Sequence[int] = (1, 16, 128, 512),
    identities: int = 65_536,
    followers: int = 100,
) -> None:
    gc.set_threshold(*COLLECT_EVERY)
    quiet()
    uvloop.run(bench(rounds, seconds, levels, identities, followers))


if __name__ == "__main__":
    print(figures.machine())
    main()
