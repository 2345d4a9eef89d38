"""What the memory store offers to tests beyond the contract."""

from __future__ import annotations

import asyncio

import pytest

from services.runtime.errors import Invalid, NotFound, Retry
from services.store.memory import MemoryStore
from services.store.model import Removed, Synced
from tests.fakes.clock import FakeClock
from tests.fakes.etcd import Follower, keys_of


async def test_a_lease_ends_by_the_clock_and_a_watcher_sees_it() -> None:
    clock = FakeClock()
    async with MemoryStore(clock) as store:
        lease = await store.grant(10)
        await store.put("p/a", b"", lease)
        seen = Follower(store.watch("p/"))
        await seen.until_synced()
        await clock.advance(9)
        assert await store.keep_alive(lease) == 10
        await clock.advance(9)
        assert await store.get("p/a") is not None
        await clock.advance(1)
        assert isinstance((await seen.step())[0], Removed)
        assert await store.keep_alive(lease) == 0


async def test_a_lease_ends_at_the_next_call_without_async_with() -> None:
    clock = FakeClock()
    store = MemoryStore(clock)
    lease = await store.grant(10)
    other = await store.grant(20)
    await store.put("a", b"", lease)
    await store.put("b", b"", other)
    await clock.advance(10)
    assert [kv.key for kv in (await store.list("")).items] == ["b"]
    with pytest.raises(NotFound):
        await store.put("a", b"", lease)
    await clock.advance(10)
    assert await store.get("b") is None


async def test_a_broken_watch_tells_the_difference() -> None:
    store = MemoryStore(FakeClock())
    await store.put("p/kept", b"")
    await store.put("p/removed", b"")
    seen = Follower(store.watch("p/"))
    await seen.until_synced()
    await store.delete("p/removed")
    await store.put("p/added", b"")
    store.break_watches()
    batch = await seen.step()
    assert sorted(keys_of(batch)) == ["p/added", "p/removed"]
    assert [e.key for e in batch if isinstance(e, Removed)] == ["p/removed"]


async def test_compaction_before_a_slow_watcher_tells_the_difference() -> None:
    store = MemoryStore(FakeClock())
    seen = Follower(store.watch("p/"))
    await seen.until_synced()
    await store.put("p/a", b"1")
    await store.put("p/b", b"")
    await store.delete("p/b")
    store.compact()
    await store.put("p/a", b"2")
    assert keys_of(await seen.step()) == ["p/a"]
    assert seen.values == {"p/a": b"2"}


async def test_an_unreachable_store_fails_calls_and_holds_watches() -> None:
    store = MemoryStore(FakeClock())
    store.set_reachable(False)
    with pytest.raises(Retry):
        await store.put("p/a", b"")
    seen = Follower(store.watch("p/"))
    async with asyncio.TaskGroup() as group:
        step = group.create_task(seen.step())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not step.done()
        store.set_reachable(True)
    assert isinstance(step.result()[-1], Synced)


async def test_a_closed_store_refuses_calls() -> None:
    store = MemoryStore(FakeClock())
    await store.close()
    with pytest.raises(Invalid, match="closed"):
        await store.get("a")
