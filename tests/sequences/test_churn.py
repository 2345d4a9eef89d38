"""Endpoints that come and go: what each node is told of all the others is bounded.

TESSERA_CHURN_NODES=5000 pytest -s tests/sequences/test_churn.py      prints the row of the table
"""

from __future__ import annotations

import asyncio
import os
import random

from services.policy.resolve import Resolver, ResolverSettings
from services.policyd.distribute import Distributor
from services.policyd.state import State
from services.policyd.subscriber import Subscription
from services.store.model import Changed, KeyValue, Removed, Revision, Synced, WatchEvent
from tests.fakes import cluster_keys as keys
from tests.fakes.clock import FakeClock

NODES = int(os.environ.get("TESSERA_CHURN_NODES", "200"))
ENDPOINTS = NODES * 20
# One in a hundred is replaced each minute.
PER_S = ENDPOINTS / 100 / 60
SECONDS = 60
APPS = 100
# policyd's longest pause, plus the one that the first change after a quiet time does not wait for.
MOST_MESSAGES = SECONDS / min(NODES * 100e-6, 0.5) + 1


class Cluster:
    def __init__(self) -> None:
        self.state = State(Resolver(ResolverSettings(allow_localhost=False)))
        self.distributor = Distributor(self.state)
        self.revision = 0
        items = [keys.identity(1000 + n, keys.pod(f"a{n}")) for n in range(APPS)]
        items += [
            keys.policy(keys.allow(f"p{n}", f"a{n}", f"a{n - 1}"), 16 + n) for n in range(APPS)
        ]
        items += [keys.address(self.ip(n), 1000 + n % APPS, self.host(n)) for n in range(ENDPOINTS)]
        self.feed([self.put(*item) for item in items] + [Synced(Revision(len(items)))])

    @staticmethod
    def ip(number: int) -> str:
        return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"

    @staticmethod
    def host(number: int) -> str:
        return f"172.16.{number % NODES >> 8}.{number % NODES & 255}"

    def put(self, key: str, value: bytes) -> WatchEvent:
        self.revision += 1
        return Changed(KeyValue(key, value, Revision(self.revision), Revision(self.revision), 1))

    def feed(self, events: list[WatchEvent]) -> None:
        self.distributor.publish(self.state.apply(events))

    def replace(self, number: int) -> None:
        """One endpoint goes, another comes to the same node."""
        fresh = number + ENDPOINTS
        self.revision += 1
        gone = Removed(keys.address(self.ip(number), 0)[0], Revision(self.revision))
        self.feed([gone])
        self.feed(
            [self.put(*keys.address(self.ip(fresh), 1000 + number % APPS, self.host(number)))]
        )


class Node:
    def __init__(self, outlet: Subscription) -> None:
        self.outlet = outlet
        self.messages = 0
        self.bytes = 0

    def read(self) -> None:
        if self.outlet.is_woken:
            for message in self.outlet.take():
                self.messages += 1
                self.bytes += len(message)


async def test_churn_costs_each_node_a_bounded_number_of_messages() -> None:
    cluster, clock, rng = Cluster(), FakeClock(), random.Random(1)
    nodes = []
    for number in range(NODES):
        follows = [1000 + (number + k) % APPS for k in range(5)]
        with cluster.distributor.subscribed(f"n{number}", follows) as outlet:
            nodes.append(Node(outlet))
        cluster.distributor.subscriptions.add(outlet)
    for node in nodes:
        node.read()
        node.messages = node.bytes = 0
    before, due = cluster.revision, 0.0
    step_s = 0.025
    async with asyncio.TaskGroup() as group:
        pacing = group.create_task(cluster.distributor.pace(clock))
        for _ in range(int(SECONDS / step_s)):
            due += PER_S * step_s
            while due >= 1:
                cluster.replace(rng.randrange(ENDPOINTS))
                due -= 1
            await clock.advance(step_s)
            for node in nodes:
                node.read()
        pacing.cancel()
    changes = cluster.revision - before
    messages, received = nodes[0].messages, nodes[0].bytes
    print(
        f"{NODES} nodes, {ENDPOINTS} endpoints, 1 %/min: {changes} changes of the store a minute;"
        f" each node {messages} messages, {received} bytes; all {messages * NODES} messages"
    )
    assert changes > 0
    assert 0 < messages <= MOST_MESSAGES
    # An address is some 60 bytes, its removal some 15; a header some 30.
    assert received < 60 * changes + 40 * messages


async def test_what_changes_a_verdict_does_not_wait_for_addresses() -> None:
    cluster, clock = Cluster(), FakeClock()
    with cluster.distributor.subscribed("n1", [1001]) as outlet:
        pass
    for number in range(10_000):  # so many that the long pause is its longest
        with cluster.distributor.subscribed(f"m{number}", []) as other:
            pass
        cluster.distributor.subscriptions.add(other)
    cluster.distributor.subscriptions.add(outlet)
    node = Node(outlet)
    node.read()
    async with asyncio.TaskGroup() as group:
        pacing = group.create_task(cluster.distributor.pace(clock))
        cluster.replace(1)
        await clock.advance(0.3)
        node.read()
        cluster.replace(2)
        await clock.advance(0.1)
        assert not outlet.is_woken, "an address was told within the pause"
        cluster.feed([cluster.put(*keys.identity(5000, keys.pod("a0")))])
        await clock.advance(0.06)
        assert outlet.is_woken, "a new member of a group waits for the pause of addresses"
        pacing.cancel()
