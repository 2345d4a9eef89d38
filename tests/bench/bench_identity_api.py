"""Operators' reads at full size: all 65,000 identities listed, and changes told to 100 watchers.

    list    REST by pages ── apid ── gRPC ── identityd's view     beside it: the view by gRPC at
                                                                  once, the range read from etcd
    watch   Allocate ──► etcd ──► identityd ──► apid ──► N clients (server-sent events)
                           └── beside it: N plain watches of the same prefix

No kernel and no agent. The readers share the machine's cores with what they read.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from tessera_wire.etcd import etcd_pb2, etcd_pb2_grpc
from tessera_wire.identity.v1 import identity_pb2, identity_pb2_grpc, queries_pb2, queries_pb2_grpc

from identity import keys
from services.runtime.config import EtcdConfig
from services.store.etcd import EtcdStore
from services.store.model import prefix_end
from services.wire.client import call, channel
from tests.bench import figures
from tests.bench.doors import Door
from tests.fakes.stack import ControlPlane

IDENTITIES = 65_000
BATCH = 1000
DEADLINE_S = 60.0
_CREATED = b"event: created\n"


class Allocations:
    """A node that asks for identities of labels nobody had."""

    def __init__(self, stub: identity_pb2_grpc.IdentityServiceStub, lease: int) -> None:
        self._stub = stub
        self._lease = lease
        self._made = 0

    def skip(self, count: int) -> None:
        """So many there are from another node."""
        self._made = count

    async def more(self, count: int) -> None:
        sets = [
            [
                "k8s:io.kubernetes.pod.namespace=shop",
                f"k8s:app=app-{at % 97}",
                f"k8s:instance=i-{at}",
            ]
            for at in range(self._made, self._made + count)
        ]
        self._made += count
        items = [identity_pb2.AllocateItem(labels=identity_pb2.LabelSet(labels=s)) for s in sets]
        request = identity_pb2.AllocateRequest(node="bench", lease=self._lease, items=items)
        answer = await call(self._stub.Allocate, request, deadline_s=DEADLINE_S)
        assert all(result.identity for result in answer.results), answer.results[0]


@asynccontextmanager
async def allocations(plane: ControlPlane) -> AsyncIterator[Allocations]:
    async with channel(f"unix://{plane.layout.socket('identityd')}") as dialled:
        stub = identity_pb2_grpc.IdentityServiceStub(dialled)
        opened = identity_pb2.OpenSessionRequest(node="bench", ttl_s=300)
        session = await call(stub.OpenSession, opened, deadline_s=DEADLINE_S)
        yield Allocations(stub, session.lease)


# ------------------------------------------------------------------ lists


def by_pages(plane: ControlPlane, limit: int, fields: str = "") -> tuple[int, float]:
    """(identities, seconds)"""
    door = Door(plane.layout.socket("apid"))
    started, count, cursor = time.perf_counter(), 0, ""
    while True:
        path = f"/v1/identities?labels=instance&limit={limit}&fields={fields}&cursor={cursor}"
        page = door.ask("GET", path)
        count += len(page["identities"])
        cursor = page["next"]
        if not cursor:
            door.close()
            return count, time.perf_counter() - started


async def by_grpc(stub: queries_pb2_grpc.IdentityQueriesStub) -> tuple[int, float]:
    started = time.perf_counter()
    request = queries_pb2.ListRequest(selector="instance")
    answer = await call(stub.List, request, deadline_s=DEADLINE_S)
    return len(answer.identities), time.perf_counter() - started


async def from_etcd(store: EtcdStore) -> tuple[int, float]:
    started = time.perf_counter()
    listing = await store.list(keys.ID_PREFIX)
    return len(listing.items), time.perf_counter() - started


async def lists(plane: ControlPlane, store: EtcdStore, rounds: int, held: int) -> None:
    samples: dict[str, list[float]] = defaultdict(list)
    async with channel(f"unix://{plane.layout.socket('identityd')}") as dialled:
        stub = queries_pb2_grpc.IdentityQueriesStub(dialled)
        for _ in range(rounds):
            for name, (count, took_s) in {
                "REST, pages of 10,000": by_pages(plane, 10_000),
                "REST, pages of 10,000, fields=id": by_pages(plane, 10_000, "id"),
                "REST, pages of 500": by_pages(plane, 500),
                "identityd by gRPC, at once": await by_grpc(stub),
                "the range of etcd, labels unread": await from_etcd(store),
            }.items():
                assert count == held, (name, count, held)
                samples[name].append(took_s)
    figures.table(f"all {held:,} identities, {rounds} times", samples)


# ------------------------------------------------------------------ watches


async def stream_client(plane: ControlPlane, ready: asyncio.Event, count: int) -> float:
    """When it has heard of `count` new identities."""
    reader, writer = await asyncio.open_unix_connection(str(plane.layout.socket("apid")))
    # From now on, not the list first: what is measured is the change.
    revision = json.loads(plane.rest.get("/v1/identities/stats"))["revision"]
    path = f"/v1/identities/watch?labels=instance&since={revision}"
    writer.write(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
    await reader.readuntil(b"event: bookmark\n")
    ready.set()
    heard, tail = 0, b""
    while heard < count:
        tail += await reader.read(1 << 16)
        heard += tail.count(_CREATED)
        tail = tail[tail.rfind(b"\n", 0, len(tail) - len(_CREATED)) + 1 :][-len(_CREATED) + 1 :]
    writer.close()
    return time.perf_counter()


async def etcd_client(target: str, ready: asyncio.Event, count: int) -> float:
    """As plain as can be: from now on, on a connection of its own, keys unread."""
    heard = 0
    create = etcd_pb2.WatchCreateRequest(
        key=keys.ID_PREFIX.encode(), range_end=prefix_end(keys.ID_PREFIX).encode()
    )
    async with channel(target) as dialled:
        stream = etcd_pb2_grpc.WatchStub(dialled).Watch()
        await stream.write(etcd_pb2.WatchRequest(create_request=create))
        while heard < count:
            answer = await stream.read()
            heard += len(answer.events)
            if answer.created:
                ready.set()
        stream.cancel()
    return time.perf_counter()


async def told(
    clients: list[Callable[[asyncio.Event], Awaitable[float]]], made: Allocations, count: int
) -> float:
    """Seconds from the request until the last client has heard of the last identity."""
    ready = [asyncio.Event() for _ in clients]
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        hearing = [tasks.create_task(one(at)) for one, at in zip(clients, ready, strict=True)]
        for event in ready:
            await event.wait()
        started = time.perf_counter()
        await made.more(count)
    return max(task.result() for task in hearing) - started


async def watches(plane: ControlPlane, rounds: int, clients: int, burst: int) -> None:
    etcd = f"127.0.0.1:{plane.etcd_port}"
    samples: dict[str, list[float]] = defaultdict(list)
    async with allocations(plane) as made:
        for _ in range(rounds):
            for count in (1, clients):
                streams = [lambda at: stream_client(plane, at, burst)] * count
                label = f"{count} over REST, {burst:,} changes"
                samples[label].append(await told(streams, made, burst))
            direct = [lambda at: etcd_client(etcd, at, burst)] * clients
            label = f"{clients} of etcd, {burst:,} changes"
            samples[label].append(await told(direct, made, burst))
    figures.table(f"new identities told to all watchers, {rounds} times", samples)


async def measured(identities: int, rounds: int, clients: int, burst: int) -> None:
    plane = ControlPlane.start("ids", {"identityd": {"namespace_quota": 0}})
    async with AsyncExitStack() as stack:
        stack.callback(plane.stop)
        store = EtcdStore(EtcdConfig(endpoints=(f"127.0.0.1:{plane.etcd_port}",)))
        await stack.enter_async_context(store)
        await watches(plane, rounds, clients, burst)
        held = len((await store.list(keys.ID_PREFIX)).items)
        async with allocations(plane) as made:
            made.skip(held)
            for _ in range(held, identities, BATCH):
                await made.more(min(BATCH, identities - held))
                held += min(BATCH, identities - held)
            await lists(plane, store, rounds, held)


def main(
    identities: int = IDENTITIES, rounds: int = 5, clients: int = 100, burst: int = 1000
) -> None:
    asyncio.run(measured(identities, rounds, clients, burst))


if __name__ == "__main__":
    print(figures.machine())
    main()
