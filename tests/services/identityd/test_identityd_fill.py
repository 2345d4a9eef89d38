"""A cluster that runs out of numbers, on a real etcd.

TESSERA_FILL: how many numbers there are, 4096 unless given; 65280 are those of a cluster.
"""

import asyncio
import os
import random
import time
from pathlib import Path

import pytest

from identity import keys
from identity.numbers import NumericIdentity
from services.identityd.allocator import Allocated, Item
from services.identityd.gc import PRESSED_GRACE_S, Collector
from services.identityd.references import release
from services.identityd.rules import LabelRules
from services.runtime.clock import SystemClock
from services.runtime.errors import Exhausted
from services.runtime.etcd_process import EmbeddedEtcd
from services.store.open import open_store
from tests.fakes.etcd import HAVE_ETCD, NO_ETCD, config
from tests.fakes.identity_replica import assert_consistent, replica, until

pytestmark = [pytest.mark.skipif(not HAVE_ETCD, reason=NO_ETCD), pytest.mark.timeout(600)]

NUMBERS = range(256, 256 + int(os.environ.get("TESSERA_FILL", "4096")))
PRESSED_S = 2.0
SETTINGS = {"label_rules": LabelRules(warn_values=1 << 30), "pressed_quarantine_s": PRESSED_S}
PER_CALL = 2048


def item(i):
    return Item((f"k8s:app=app{i}",))


async def fill(one, lease, first, last):
    for start in range(first, last, PER_CALL):
        items = [item(i) for i in range(start, min(last, start + PER_CALL))]
        results = await one.allocator.allocate("node-a", lease, items)
        assert all(isinstance(result, Allocated) for result in results)


def collector(one, store, clock):
    """Long-lived enough to have had its rest after a start."""
    return Collector(
        store,
        one.view,
        one.counts,
        clock,
        random.Random(1),
        grace_s=60.0,
        quarantine_s=1800.0,
        session_ttl_s=1.0,
    )


async def test_a_full_cluster_says_why_serves_what_it_has_and_recovers_when_labels_go(
    tmp_path: Path,
):
    async with (
        EmbeddedEtcd(tmp_path / "data") as server,
        open_store(config(server.endpoint)) as store,
        replica(store, SystemClock(), numbers=NUMBERS, **SETTINGS) as one,
    ):
        lease = await one.open()
        await store.keep_alive(lease)
        await fill(one, lease, 0, len(NUMBERS))
        await until(lambda: one.view.in_use == len(NUMBERS), "the view has seen all", 60)
        assert len(one.view.free) == 0
        assert set((await assert_consistent(store)).values()) == set(NUMBERS)

        full, old, reserved = await one.allocator.allocate(
            "node-a", lease, [item(-1), item(7), Item(("reserved:host",))]
        )
        assert isinstance(full, Exhausted)
        assert f"of {len(NUMBERS)}, {len(NUMBERS)} are in use and 0 in quarantine" in str(full)
        assert "have the label filter ignore them" in str(full)
        assert isinstance(old, Allocated)
        assert reserved.number == 1

        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(collector(one, store, SystemClock()).run())
            gone = [NumericIdentity(n) for n in random.Random(2).sample(NUMBERS, 500)]
            began = time.perf_counter()
            await release(store, "node-a", gone)
            await until(lambda: one.view.in_quarantine == 500, "they are collected", 30)
            again = None
            while not isinstance(again, Allocated):
                [again] = await one.allocator.allocate("node-a", lease, [item(-1)])
                await asyncio.sleep(0.05)
            recovered_s = time.perf_counter() - began
            running.cancel()
        # The short grace of a full cluster, and the short quarantine.
        assert recovered_s > PRESSED_GRACE_S[0][1] + PRESSED_S - 0.5
        assert again.number in gone
        assert await store.get(keys.tomb_key(again.number)) is None
        await assert_consistent(store)


@pytest.mark.parametrize(
    ("taken", "grace_s"),
    [(0.5, 60.0), (0.81, PRESSED_GRACE_S[1][1]), (0.96, PRESSED_GRACE_S[0][1])],
)
async def test_the_fuller_the_cluster_the_shorter_an_unused_identity_is_kept(
    taken, grace_s, memory, fake_clock
):
    numbers = range(256, 456)
    async with replica(memory, fake_clock, numbers=numbers, **SETTINGS) as one:
        lease = await one.open()
        results = await one.allocate(lease, *(f"k8s:a={i}" for i in range(int(200 * taken))))
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(collector(one, memory, fake_clock).run())
            await fake_clock.advance(2.0)
            await release(memory, "node-a", [NumericIdentity(results[0])])
            await fake_clock.advance(grace_s - 1.0)
            assert one.view.labels_of(NumericIdentity(results[0])) is not None
            # Jitter, and the longest the collector sleeps.
            await fake_clock.advance(20.0)
            assert one.view.labels_of(NumericIdentity(results[0])) is None
            running.cancel()
