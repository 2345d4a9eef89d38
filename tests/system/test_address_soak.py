"""Endpoints come and go on several nodes while agents, replicas and the store are killed and
stopped; then the ledgers and the store are judged. TESSERA_SOAK_S is how long (default 12)."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import msgspec
import pytest

from ipam import keys
from services.runtime.clock import SystemClock
from services.runtime.config import EtcdConfig
from services.runtime.etcd_process import EmbeddedEtcd
from services.store.model import Store
from services.store.open import open_store
from tests.fakes import address_checker
from tests.fakes.address_soak import Soak
from tests.fakes.etcd import HAVE_ETCD, NO_ETCD

pytestmark = pytest.mark.skipif(not HAVE_ETCD, reason=NO_ETCD)

CLOCK = SystemClock()
LENGTH_S = float(os.environ.get("TESSERA_SOAK_S", "12"))
SEED = int(os.environ.get("TESSERA_SOAK_SEED", random.SystemRandom().randrange(1 << 30)))


@pytest.mark.timeout(LENGTH_S + 180)
async def test_no_address_is_given_twice_and_none_leaks_whatever_dies(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    async with EmbeddedEtcd(tmp_path / "etcd") as etcd:
        soak = Soak(tmp_path, etcd, SEED)
        await soak.start()
        try:
            ends = CLOCK.monotonic_s() + LENGTH_S
            while CLOCK.monotonic_s() < ends - LENGTH_S * 2 / 3:
                await soak.misfortune()
            await soak.lose_for_good("n0")
            while CLOCK.monotonic_s() < ends:
                await soak.misfortune()
            left = await soak.settle()
            async with open_store(EtcdConfig(endpoints=(etcd.endpoint,))) as store:
                wrong = await quiet(store, left)
        finally:
            await soak.stop()
    ledgers = soak.ledgers()
    given = sum(1 for lines in ledgers.values() for line in lines if line[1] == "given")
    print(f"{given} endpoints given addresses, {len(soak.done)} misfortunes: {soak.done}")
    assert given > 100
    assert address_checker.twice(ledgers, soak.dead) == []
    assert wrong == []


async def quiet(store: Store, left: dict[str, set[str]]) -> list[str]:
    """What is still wrong when leaks have had their time: a node is gone after 30 s, and what a
    node does not know is missed twice in a row, which is a minute."""
    until = CLOCK.monotonic_s() + 100
    while True:
        wrong = await address_checker.stored(store, left)
        if not wrong or CLOCK.monotonic_s() > until:
            return wrong
        await asyncio.sleep(0.5)


@pytest.mark.timeout(180)
async def test_the_judge_finds_a_service_that_breaks_into_windows(tmp_path: Path) -> None:
    """Behind everybody's back the store says that there are no windows, and the nodes go on."""
    async with EmbeddedEtcd(tmp_path / "etcd") as etcd:
        soak = Soak(tmp_path, etcd, SEED, nodes=2, replicas=1)
        await soak.start()
        try:
            async with open_store(EtcdConfig(endpoints=(etcd.endpoint,))) as store:
                for _ in range(40):
                    for kv in (await store.list(keys.BLOCKS)).items:
                        record = msgspec.json.decode(kv.value, type=keys.BlockRecord)
                        if record.window:
                            record = msgspec.structs.replace(record, window=0)
                            await store.put(kv.key, msgspec.json.encode(record))
                    if address_checker.twice(soak.ledgers(), {}):
                        break
                    await asyncio.sleep(0.5)
        finally:
            await soak.stop()
    assert address_checker.twice(soak.ledgers(), {}) != []
