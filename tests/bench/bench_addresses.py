"""Addresses: through the service, out of a node's window, and all of them read back after a start.

    one call, one address    client ──► ipamd ──► etcd          16 in flight, and one
    a node's log told        64 in one call ──► ipamd ──► etcd  16 in flight
    without gRPC             the allocator in this process ──► etcd
    a window                 the agent's Addressing ──► its log, synced to disk

Beside them, in turns: the other way to keep addresses, one object per block of 64 with all its
allocations in it, read, changed and compared as a whole, and a handle object per owner; each of the
16 clients has a block of its own, so that none waits for another's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import uvloop
from tessera_wire.ipam.v1 import ipam_pb2 as pb
from tessera_wire.ipam.v1.ipam_pb2_grpc import IpamServiceStub

from datapath.agent.addressing import Addressing
from datapath.agent.addresslog import AddressLog
from datapath.agent.record import EndpointRecord, State
from ipam import keys
from ipam.allocate import Pick, Request
from ipam.block import Block, address_text, parse_block
from ipam.keys import Owner, PoolRecord
from ipam.view import Claimed, View
from services.ipamd import pools, transactions
from services.ipamd.allocator import Allocator
from services.ipamd.cooldown import CoolDown
from services.ipamd.follow import Follower
from services.runtime import log
from services.runtime.clock import SystemClock
from services.runtime.config import EtcdConfig
from services.runtime.etcd_process import EmbeddedEtcd
from services.store.commit import Committer
from services.store.model import Put, Store, Txn
from services.store.open import open_store
from services.store.txn import bulk_txn, mod_is
from services.wire.client import call, channel
from tests.bench import figures

IN_FLIGHT = 16
BATCH = 64
DEADLINE_S = 30.0

CONFIG = """
[etcd]
endpoints = ["{endpoint}"]
[log]
level = "warning"
[ipamd]
listen = "unix://{folder}/ipamd.sock"
metrics_listen = ""
release_cooldown_s = 0
[ipamd.pools.default]
cidrs = ["10.0.0.0/8"]
"""

Work = Callable[[int], Awaitable[None]]


@asynccontextmanager
async def service(folder: Path) -> AsyncIterator[tuple[str, str]]:
    """(etcd's endpoint, ipamd's target)."""
    async with EmbeddedEtcd(folder / "etcd") as etcd:
        config = folder / "ipamd.toml"
        config.write_text(CONFIG.format(endpoint=etcd.endpoint, folder=folder))
        ipamd = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.ipamd.main", "--config", str(config)
        )
        target = f"unix://{folder}/ipamd.sock"
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not (folder / "ipamd.sock").exists():  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.05)
            yield etcd.endpoint, target
        finally:
            ipamd.terminate()
            await ipamd.wait()


async def load(work: Work, in_flight: int, seconds: float) -> tuple[int, list[float]]:
    """(how many were done, how long each took)."""
    took: list[float] = []
    ends = time.perf_counter() + seconds

    async def one(worker: int) -> None:
        while (began := time.perf_counter()) < ends:
            await work(worker)
            took.append(time.perf_counter() - began)

    async with asyncio.TaskGroup() as group:
        for worker in range(in_flight):
            group.create_task(one(worker))
    return len(took), took


class Unary:
    def __init__(self, stub: IpamServiceStub) -> None:
        self._stub = stub
        self._number = itertools.count()

    async def __call__(self, worker: int) -> None:
        owner = pb.Owner(
            namespace="bench", name=f"u{next(self._number)}", interface="eth0", uid="1"
        )
        request = pb.AllocateRequest(node=f"node-{worker}", owner=owner)
        await call(self._stub.Allocate, request, deadline_s=DEADLINE_S)


class Told:
    """Each worker is a node with windows; a call tells of 64 addresses, the next of their release,
    which is counted too: it is as many writes."""

    def __init__(self, stub: IpamServiceStub) -> None:
        self._stub = stub
        self._windows: dict[int, list[int]] = {}
        self._given: dict[int, list[pb.ReplayEntry]] = {}

    async def prepare(self, workers: int) -> None:
        for worker in range(workers):
            addresses: list[int] = []
            request = pb.SyncWindowsRequest(
                node=f"told-{worker}",
                instance="x",
                wanted=[pb.WindowWanted(pool="default", family=4)] * 3,
            )
            answer = await call(self._stub.SyncWindows, request, deadline_s=DEADLINE_S)
            for given in answer.given:
                block = parse_block(given.window.block)
                addresses += range(block.base + 1, block.base + given.window.size)
            self._windows[worker] = addresses[:BATCH]

    async def __call__(self, worker: int) -> None:
        before = self._given.pop(worker, None)
        if before is not None:
            for entry in before:
                entry.released = True
            entries = before
        else:
            entries = self._given[worker] = [
                pb.ReplayEntry(
                    owner=pb.Owner(
                        namespace="bench", name=f"t{worker}-{n}", interface="eth0", uid="1"
                    ),
                    pool="default",
                    addresses=[address_text(address)],
                )
                for n, address in enumerate(self._windows[worker])
            ]
        request = pb.ReplayRequest(node=f"told-{worker}", entries=entries)
        answer = await call(self._stub.Replay, request, deadline_s=DEADLINE_S)
        assert not any(result.lost for result in answer.results)


class Direct:
    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator
        self._number = itertools.count()

    async def __call__(self, worker: int) -> None:
        owner = Owner("bench", f"d{next(self._number)}", "eth0", "1")
        await self._allocator.allocate(Request(f"direct-{worker}", owner, "default"))


class WholeBlock:
    """The block is one JSON object: allocations by ordinal, attributes of each; a write replaces it
    under the revision it was read at. A new handle is written before, as its users do."""

    def __init__(self, store: Store, run: int) -> None:
        self._store = store
        self._run = run
        self._block: dict[int, int] = defaultdict(int)
        self._number = itertools.count()

    async def __call__(self, worker: int) -> None:
        owner = f"h{self._run}-{next(self._number)}"
        handle = json.dumps({"handle": owner, "block": {f"{worker}": 1}}).encode()
        await self._store.put(f"bench/handle/{owner}", handle)
        while True:
            key = f"bench/block/{self._run}/{worker}/{self._block[worker]}"
            held = await self._store.get(key)
            body = json.loads(held.value) if held is not None else {"alloc": [], "attrs": []}
            if len(body["alloc"]) == 64:
                self._block[worker] += 1
                continue
            body["alloc"].append(len(body["attrs"]))
            body["attrs"].append(
                {"handle": owner, "node": f"node-{worker}", "pod": owner, "namespace": "bench"}
            )
            compare = mod_is(key, held.mod_revision if held is not None else 0)
            put = Put(key, json.dumps(body).encode())
            if (await self._store.txn(Txn((compare,), (put,)))).succeeded:
                return


async def rates(folder: Path, rounds: int, seconds: float) -> None:
    clock = SystemClock()
    done: dict[str, list[float]] = defaultdict(list)
    took: dict[str, list[float]] = defaultdict(list)
    async with (
        service(folder) as (endpoint, target),
        channel(target) as dialled,
        open_store(EtcdConfig(endpoints=(endpoint,))) as store,
        Committer(store) as committer,
    ):
        stub, view = IpamServiceStub(dialled), View()
        follower = Follower(store, view)
        allocator = Allocator(store, committer, view, clock, Random(1), CoolDown(store, clock, 0))
        async with asyncio.TaskGroup() as group:
            following = group.create_task(follower.run())
            await follower.synced.wait()
            unary, told, direct = Unary(stub), Told(stub), Direct(allocator)
            await told.prepare(IN_FLIGHT)
            for n in range(rounds):
                alternatives: list[tuple[str, Work, int, int]] = [
                    ("service, 16 in flight", unary, IN_FLIGHT, 1),
                    ("service, one at a time", unary, 1, 1),
                    ("64 told at once, 16 in flight", told, IN_FLIGHT, BATCH),
                    ("without gRPC, 16 in flight", direct, IN_FLIGHT, 1),
                    ("whole blocks, 16 in flight", WholeBlock(store, n), IN_FLIGHT, 1),
                    ("whole blocks, one at a time", WholeBlock(store, rounds + n), 1, 1),
                ]
                for name, work, in_flight, each in alternatives:
                    count, samples = await load(work, in_flight, seconds)
                    done[name].append(count * each / seconds)
                    took[name] += samples
            following.cancel()
    figures.table(f"how long a call takes, {rounds} rounds of {seconds:g} s each", took)
    print("  addresses a second, median of rounds:")
    for name, per_second in done.items():
        print(f"    {name:32} {sorted(per_second)[len(per_second) // 2]:9.0f}")


async def window(folder: Path, count: int) -> None:
    clock = SystemClock()
    took: dict[str, list[float]] = defaultdict(list)
    (folder / "node").mkdir()
    async with service(folder) as (_, target), channel(target) as dialled:
        stub = IpamServiceStub(dialled)
        journal = AddressLog(folder / "node")
        addressing = Addressing(
            stub, "node-a", journal=journal, records=tuple, networks=tuple, clock=clock
        )
        for _ in range(4):
            await addressing.sync()
        plain = os.open(folder / "plain", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        unary = Unary(stub)
        for n in range(count):
            record = EndpointRecord(n, "bench", f"w{n}", (), "", "eth0", f"o{n}", State.CREATING)
            began = time.perf_counter()
            await addressing.allocate(record)
            took["out of the window, on disk"].append(time.perf_counter() - began)
            await addressing.release(record)
            journal.local.cooling.clear()
            if len(journal.local.pending) > 20:
                while journal.local.pending:
                    await addressing.tell()
            began = time.perf_counter()
            os.write(plain, bytes(120))
            os.fdatasync(plain)
            took["120 bytes written and synced"].append(time.perf_counter() - began)
            began = time.perf_counter()
            await unary(1)
            took["asked of the service"].append(time.perf_counter() - began)
        os.close(plain)
        journal.close()
    figures.table(f"one address for an endpoint of a node, {count} times", took)


async def restored(folder: Path, count: int, rounds: int) -> None:
    took: dict[str, list[float]] = defaultdict(list)
    async with EmbeddedEtcd(folder / "etcd") as etcd:
        config = EtcdConfig(endpoints=(etcd.endpoint,))
        async with open_store(config) as store:
            await pools.ensure(store, {"default": PoolRecord(cidrs=("10.0.0.0/8",))})
            await fill(store, count)
            for _ in range(rounds):
                view = View()
                follower = Follower(store, view)
                began, worked = time.perf_counter(), time.process_time()
                async with asyncio.TaskGroup() as group:
                    following = group.create_task(follower.run())
                    await follower.synced.wait()
                    took["addresses, a key each"].append(time.perf_counter() - began)
                    took["  of it this process's CPU"].append(time.process_time() - worked)
                    following.cancel()
                assert view.used("default") == count
                began, worked = time.perf_counter(), time.process_time()
                listed = await store.list("bench/block/")
                bodies = [json.loads(kv.value) for kv in listed.items]
                taken = {
                    (kv.key, ordinal): attributes["handle"]
                    for kv, body in zip(listed.items, bodies, strict=True)
                    for ordinal, attributes in enumerate(body["attrs"])
                }
                took["whole blocks of 64"].append(time.perf_counter() - began)
                took["  of them this process's CPU"].append(time.process_time() - worked)
                assert len(taken) == count
    figures.table(f"{count:,} allocations read back, {rounds} times", took)


async def fill(store: Store, count: int) -> None:
    """As `count` takes would have left it, and the same as whole blocks."""
    base, puts = int.from_bytes(bytes((10, 0, 0, 0)), "big"), []
    for first in range(0, count, 64):
        block = Block(base + first, 26)
        claim = Claimed("default", block, f"node-{first // 640}", b"")
        record = keys.BlockRecord(claim.node, 0.0)
        puts += transactions.claim("default", 0, block, record).success
        attributes = []
        for n in range(first, min(first + 64, count)):
            owner = Owner("bench", f"pod-{n}", "eth0", f"uid-{n}")
            request = Request(claim.node, owner, "default")
            puts += transactions.take(request, (Pick(base + n, claim),), 0.0).success
            attributes.append({"handle": owner.name, "node": claim.node, "namespace": "bench"})
        body = {"alloc": list(range(len(attributes))), "attrs": attributes}
        puts.append(Put(f"bench/block/{first:07}", json.dumps(body).encode()))
    for at in range(0, len(puts), 2000):
        await store.txn(bulk_txn((), puts[at : at + 2000]))


def main(rounds: int = 5, seconds: float = 2.0, count: int = 300, rows: int = 100_000) -> None:
    log.configure("warning", json=False)
    for part in (
        lambda folder: rates(folder, rounds, seconds),
        lambda folder: window(folder, count),
        lambda folder: restored(folder, rows, rounds),
    ):
        with tempfile.TemporaryDirectory(prefix="tsr-bench-") as folder:
            uvloop.run(part(Path(folder)))


if __name__ == "__main__":
    print(figures.machine())
    main()
