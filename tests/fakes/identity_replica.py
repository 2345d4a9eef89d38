"""One identityd without its listener: the parts, wired to a store and a clock of the test."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from identity import keys
from identity.allocate import FreeNumbers
from identity.configured import ConfiguredIdentities
from identity.numbers import allocatable, reserved_labels
from services.identityd.allocator import Allocated, Allocator, Item
from services.identityd.announce import Announcer
from services.identityd.gc import Collector
from services.identityd.heartbeat import beat
from services.identityd.rules import LabelRules, RulesInForce
from services.identityd.session import Sessions
from services.identityd.stats import Counts
from services.identityd.view import IdentityView
from services.runtime.clock import Clock
from services.store.commit import WIDTH, WORKERS, Committer
from services.store.model import LeaseId, Store

CLUSTER = "default"
GRACE_S = 300.0
QUARANTINE_S = 1800.0
FIXED = ("128=kv-store",)
SESSION_TTL_S = 300


@dataclass
class Replica:
    store: Store
    view: IdentityView
    allocator: Allocator
    announcer: Announcer
    sessions: Sessions
    collector: Collector
    counts: Counts
    rules: RulesInForce

    async def open(self, node: str = "node-a") -> LeaseId:
        return (await self.sessions.open(node, LeaseId(0), 0, "192.0.2.1")).lease

    async def allocate(self, lease: LeaseId, *texts: str, node: str = "node-a") -> list[int]:
        """One label per set; every set must get a number."""
        results = await self.allocator.allocate(node, lease, [Item((text,)) for text in texts])
        return [self.number(result) for result in results]

    @staticmethod
    def number(result: object) -> int:
        assert isinstance(result, Allocated), result
        return result.number


@asynccontextmanager
async def replica(
    store: Store,
    clock: Clock,
    *,
    seed: int = 0,
    numbers: range | None = None,
    follow: bool = True,
    collect: bool = False,
    sync_wait_s: float = 2.0,
    pressed_quarantine_s: float = QUARANTINE_S,
    label_rules: LabelRules | None = None,
    width: int = WIDTH,
    workers: int = WORKERS,
) -> AsyncIterator[Replica]:
    numbers = allocatable(0) if numbers is None else numbers
    configured = ConfiguredIdentities(CLUSTER, FIXED)
    rules = RulesInForce(LabelRules() if label_rules is None else label_rules)
    chooser, counts = random.Random(seed), Counts()
    view = IdentityView(
        store,
        FreeNumbers(numbers, chooser),
        clock,
        standing={**reserved_labels(), **configured.labels},
        pressed_quarantine_s=pressed_quarantine_s,
        sync_wait_s=sync_wait_s,
    )
    async with (
        Committer(store, width=width, workers=workers) as committer,
        asyncio.TaskGroup() as tasks,
    ):
        made = Replica(
            store,
            view,
            Allocator(
                view,
                committer,
                counts,
                clock,
                cluster=CLUSTER,
                rules=rules,
                configured=configured,
            ),
            Announcer(store, committer, counts, numbers),
            Sessions(store, counts, cluster=CLUSTER, cluster_id=0, ttl_s=SESSION_TTL_S),
            Collector(
                store,
                view,
                counts,
                clock,
                chooser,
                grace_s=GRACE_S,
                quarantine_s=QUARANTINE_S,
                session_ttl_s=SESSION_TTL_S,
            ),
            counts,
            rules,
        )
        running = []
        running.append(tasks.create_task(rules.follow(store)))
        if follow:
            running.append(tasks.create_task(view.follow()))
            await view.ready()
            running.append(tasks.create_task(beat(store, clock)))
        if collect:
            running.append(tasks.create_task(made.collector.run()))
        try:
            yield made
        finally:
            for task in running:
                task.cancel()


async def until(condition: Callable[[], object], what: str, deadline_s: float = 10.0) -> None:
    """Polls, for things that another task is about to do."""
    try:
        async with asyncio.timeout(deadline_s):
            while not condition():  # noqa: ASYNC110 - the condition has no event
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(f"not within {deadline_s} s: {what}") from None


async def assert_consistent(store: Store) -> dict[str, int]:
    """One number per label set and one set per number; returns set -> number."""
    public = {kv.key: kv.value.decode() for kv in (await store.list(keys.ID_PREFIX)).items}
    index = {kv.key: kv.value.decode() for kv in (await store.list(keys.IDX_PREFIX)).items}
    by_set = {labels: int(key.removeprefix(keys.ID_PREFIX)) for key, labels in public.items()}
    assert len(by_set) == len(public), "a label set has two numbers"
    assert sorted(index.values()) == sorted(str(number) for number in by_set.values())
    return by_set
