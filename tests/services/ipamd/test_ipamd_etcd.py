"""The same on a real etcd: what the memory store promises must hold there."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ipam import keys
from services.ipamd import pools
from services.runtime.clock import SystemClock
from services.runtime.config import EtcdConfig, PoolConfig
from services.runtime.errors import Exhausted, Invalid
from services.runtime.etcd_process import EmbeddedEtcd
from services.store.model import Store
from services.store.open import open_store
from tests.fakes.address_service import check_store, replica

pytestmark = pytest.mark.skipif(shutil.which("etcd") is None, reason="no etcd on PATH")

SMALL = {"default": PoolConfig(cidrs=("10.0.0.0/26",), block_size=29)}  # 62 addresses, 8 blocks


@pytest.fixture
async def config(tmp_path: Path) -> AsyncIterator[EtcdConfig]:
    async with EmbeddedEtcd(tmp_path / "etcd") as etcd:
        yield EtcdConfig(endpoints=(etcd.endpoint,))


@pytest.fixture
async def store(config: EtcdConfig) -> AsyncIterator[Store]:
    async with open_store(config) as opened:
        yield opened


async def test_two_replicas_fill_a_pool_without_handing_an_address_out_twice(
    config: EtcdConfig, store: Store
) -> None:
    clock = SystemClock()
    async with (
        open_store(config) as other,
        replica(store, clock, SMALL) as one,
        replica(other, clock, seed=2) as two,
    ):
        async with asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task((one, two)[n % 2].allocate(f"w{n}", "abc"[n % 3]))
                for n in range(62)
            ]
        assert len({task.result() for task in asked}) == 62
        for each in (one, two):
            with pytest.raises(Exhausted, match="62 of 62"):
                await each.allocate("late")
        again = [await one.allocate(f"w{n}", "abc"[n % 3]) for n in range(5)]
        assert again == [asked[n].result() for n in range(5)]
    assert len(await check_store(store)) == 62


async def test_release_cool_down_and_reuse(store: Store) -> None:
    tiny = {"default": PoolConfig(cidrs=("10.0.0.0/30",), block_size=30)}
    async with replica(store, SystemClock(), tiny, cooldown_s=2) as one:
        first, _ = await one.allocate("a"), await one.allocate("b")
        assert await one.release("a")
        with pytest.raises(Exhausted, match="1 free again within the cool-down"):
            await one.allocate("c")
        async with asyncio.timeout(15):
            while one.view.cooling("default"):  # noqa: ASYNC110 - the lease ends by etcd's clock
                await asyncio.sleep(0.05)
        assert await one.allocate("c") == first


async def test_an_empty_block_is_given_back_and_a_used_one_is_not(store: Store) -> None:
    async with replica(store, SystemClock(), SMALL, empty_for_s=0) as one:
        await one.allocate("a", wanted="10.0.0.1")
        await one.allocate("b", wanted="10.0.0.9")
        await one.release("a")
        assert await one.reclaimer.once() == 1
        blocks = (await store.list(keys.BLOCKS)).items
        assert [str(keys.parse_block_key(kv.key)[1]) for kv in blocks] == ["10.0.0.8/29"]
    assert await check_store(store) == {"shop/b eth0": "10.0.0.9"}


async def test_a_pool_shrinks_only_where_nothing_is_in_use(store: Store) -> None:
    wide = {"default": PoolConfig(cidrs=("10.0.0.0/26", "10.0.1.0/26"), block_size=29)}
    narrow = {"default": PoolConfig(cidrs=("10.0.0.0/26",), block_size=29)}
    async with replica(store, SystemClock(), wide) as one:
        await one.allocate("db", wanted="10.0.1.9")
        with pytest.raises(Invalid, match=r"loses 1 addresses in use \(10\.0\.1\.9 of shop/db"):
            await pools.ensure(store, narrow)
        await one.release("db")
        await pools.ensure(store, narrow)
        assert (await store.list(keys.BLOCKS)).items == ()
