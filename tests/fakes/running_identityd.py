"""identityd in this process, on a store and a clock of the test and a unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from tessera_wire.identity.v1 import identity_pb2_grpc, queries_pb2_grpc

from services.identityd.allocator import Item
from services.identityd.published import AddressValue
from services.identityd.queries import IdentityQueries
from services.identityd.query_service import IdentityQueriesDoor
from services.identityd.references import release
from services.identityd.service import IdentityServicer
from services.identityd.trend import Trend
from services.runtime.clock import Clock
from services.store.model import LeaseId, Store
from services.wire.client import channel
from services.wire.server import serve
from tests.fakes.identity_replica import CLUSTER, Replica, replica, until

NODE = "node-a"
HOST_IP = "192.0.2.1"


@dataclass(frozen=True, slots=True)
class RunningIdentityd:
    replica: Replica
    trend: Trend
    target: str
    asked: queries_pb2_grpc.IdentityQueriesStub
    lease: LeaseId

    async def allocate(self, *texts: str) -> list[int]:
        """One label per set, seen by the view."""
        return await self.allocate_sets(*((text,) for text in texts))

    async def allocate_sets(self, *sets: tuple[str, ...]) -> list[int]:
        items = [Item(labels) for labels in sets]
        results = await self.replica.allocator.allocate(NODE, self.lease, items)
        numbers = [self.replica.number(result) for result in results]
        view = self.replica.view
        await until(lambda: all(view.labels_of(n) for n in numbers), "the identities")
        return numbers

    async def announce(self, number: int, *endpoints: tuple[str, str, str]) -> None:
        """(namespace, name, address) each."""
        values = [
            AddressValue(ip, HOST_IP, number, namespace=namespace, name=name)
            for namespace, name, ip in endpoints
        ]
        await self.replica.announcer.announce(NODE, self.lease, values)
        view = self.replica.view
        await until(lambda: all(view.announced.at(v.ip) for v in values), "the addresses")

    async def remove(self, *numbers: int) -> None:
        """As a collection does, at once."""
        await release(self.replica.store, NODE, numbers)
        for number in numbers:
            item = self.replica.view.collectable(number)
            await self.replica.store.delete(f"tessera/id/idx/{item.digest}")
            await self.replica.store.delete(f"cilium/state/identities/v1/id/{number}")
        view = self.replica.view
        await until(lambda: not any(view.labels_of(n) for n in numbers), "the removals")


@asynccontextmanager
async def running_identityd(
    store: Store, clock: Clock, folder: Path
) -> AsyncIterator[RunningIdentityd]:
    async with replica(store, clock) as one, asyncio.TaskGroup() as tasks:
        trend = Trend(one.view, clock)
        door = IdentityQueriesDoor(
            one.view,
            IdentityQueries(one.view, clock, CLUSTER),
            trend,
            clock,
            cluster=CLUSTER,
            cluster_id=0,
        )

        servicer = IdentityServicer(
            store,
            one.view,
            one.allocator,
            one.rules,
            one.announcer,
            one.sessions,
            cluster=CLUSTER,
            cluster_id=0,
        )

        def register(server: grpc.aio.Server) -> None:
            identity_pb2_grpc.add_IdentityServiceServicer_to_server(servicer, server)
            queries_pb2_grpc.add_IdentityQueriesServicer_to_server(door, server)

        running = [tasks.create_task(trend.count()), tasks.create_task(trend.sample())]
        async with (
            serve(f"unix://{folder}/identityd.sock", register) as bound,
            channel(bound.target) as dialled,
        ):
            asked = queries_pb2_grpc.IdentityQueriesStub(dialled)
            yield RunningIdentityd(one, trend, bound.target, asked, await one.open(NODE))
        for task in running:
            task.cancel()
