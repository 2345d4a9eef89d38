"""The address service on the memory store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from ipam import keys
from ipam.view import Assigned
from services.runtime.config import PoolConfig
from services.runtime.errors import Conflict, Exhausted, Invalid, NotFound, Retry
from services.store.memory import MemoryStore
from tests.fakes.address_service import Replica, check_store, replica
from tests.fakes.clock import FakeClock
from tests.fakes.gated_store import Gate, GatedStore

SMALL = {"default": PoolConfig(cidrs=("10.0.0.0/28",), block_size=30)}  # 14 addresses, 4 blocks
WIDE = {"default": PoolConfig(cidrs=("10.0.0.0/16",), block_size=26)}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def store(clock: FakeClock) -> AsyncIterator[MemoryStore]:
    async with MemoryStore(clock) as memory:
        yield memory


async def until(view_says) -> None:
    """Lets the watch catch up."""
    async with asyncio.timeout(5):
        while not view_says():  # noqa: ASYNC110 - the view has no event for every row
            await asyncio.sleep(0)


def forget(late: Replica, row: Assigned) -> None:
    """As if its watch had not come that far."""
    late.view.remove_address(row.pool, row.address, row.revision)


async def fill(one: Replica, count: int, node: str = "a") -> list[str]:
    return [await one.allocate(f"{node}-{n}", node) for n in range(count)]


async def test_an_owner_keeps_its_address_however_often_it_asks(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        first = await one.allocate("web")
        assert [await one.allocate("web") for _ in range(3)] == [first] * 3
    assert await check_store(store) == {"shop/web eth0": first}


async def test_a_hundred_owners_at_once_get_a_hundred_addresses(store, clock) -> None:
    async with replica(store, clock, WIDE) as one:
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(one.allocate(f"w{n}")) for n in range(100)]
        assert len({task.result() for task in asked}) == 100
        # 63 fit the first block; one claim is under way at a time, so there are two, not a hundred.
        assert len(list(one.view.blocks())) == 2
    assert len(await check_store(store)) == 100


async def test_one_owner_at_once_through_two_replicas_gets_one_address(store, clock) -> None:
    async with replica(store, clock, WIDE) as one, replica(store, clock, seed=2) as two:
        async with asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task(each.allocate("web")) for each in (one, two) for _ in range(8)
            ]
        assert len({task.result() for task in asked}) == 1
    assert len(await check_store(store)) == 1


async def test_two_replicas_never_hand_out_one_address_twice(store, clock) -> None:
    async with replica(store, clock, SMALL) as one, replica(store, clock, seed=2) as two:
        async with asyncio.TaskGroup() as tasks:
            asked = [
                tasks.create_task((one, two)[n % 2].allocate(f"w{n}", "ab"[n % 2]))
                for n in range(14)
            ]
        assert len({task.result() for task in asked}) == 14
        with pytest.raises(Exhausted):
            await one.allocate("one-more")
    assert len(await check_store(store)) == 14


async def test_a_node_borrows_when_no_block_is_free(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        for node in "abcd":
            await one.allocate(f"first-{node}", node)
        assert len(list(one.view.blocks())) == 4
        borrowed = await one.allocate("guest", "e")
        assert borrowed
        assert one.allocator.counts.borrowed == 1
        assert {claim.node for claim in one.view.blocks()} == set("abcd")


async def test_every_address_of_the_pool_can_be_used_by_one_node(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        addresses = await fill(one, 14)
    assert sorted(addresses, key=lambda a: int(a.split(".")[3])) == [
        f"10.0.0.{n}" for n in range(1, 15)
    ]


async def test_an_exhausted_pool_says_so_and_recovers_after_a_release(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        await fill(one, 14)
        with pytest.raises(Exhausted) as caught:
            await one.allocate("late")
        assert str(caught.value) == (
            "pool default (10.0.0.0/28) is exhausted: 14 of 14 addresses in use; release endpoints"
            " or add a CIDR to pool default"
        )
        freed = await one.allocate("a-3")
        assert await one.release("a-3")
        assert await one.allocate("late") == freed


async def test_a_released_address_rests_for_the_cool_down(store, clock) -> None:
    async with replica(store, clock, SMALL, cooldown_s=30) as one:
        addresses = await fill(one, 14)
        assert await one.release("a-5")
        with pytest.raises(Exhausted, match="1 free again within the cool-down"):
            await one.allocate("late")
        await clock.advance(29)
        with pytest.raises(Exhausted):
            await one.allocate("late")
        await clock.advance(5)
        await until(lambda: not one.view.cooling("default"))
        assert await one.allocate("late") == addresses[5]


async def test_a_replica_that_has_not_heard_of_a_release_respects_the_cool_down(
    store, clock
) -> None:
    async with (
        replica(store, clock, SMALL, cooldown_s=30) as one,
        replica(store, clock, cooldown_s=30, seed=2) as two,
    ):
        await fill(one, 14)
        await until(lambda: two.view.used("default") == 14)
        await one.release("a-5")
        with pytest.raises(Exhausted):
            await two.allocate("late")


async def test_releases_share_leases(store, clock) -> None:
    async with replica(store, clock, SMALL, cooldown_s=30) as one:
        await fill(one, 14)
        async with asyncio.TaskGroup() as tasks:
            for n in range(14):
                tasks.create_task(one.release(f"a-{n}"))
        resting = (await store.list(keys.COOLING)).items
        assert len(resting) == 14
        assert len({kv.lease for kv in resting}) == 1


async def test_releasing_twice_or_what_nobody_has_is_false(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        await one.allocate("web")
        assert await one.release("web")
        assert not await one.release("web")
        assert not await one.release("never")
    assert await check_store(store) == {}


async def test_a_late_release_does_not_hit_the_next_incarnation(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        await one.allocate("web", uid="u1")
        assert await one.release("web", uid="u1")
        second = await one.allocate("web", "b", uid="u2")
        assert not await one.release("web", "b", uid="u1")
        assert not await one.release("web", "a")
        assert await check_store(store) == {"shop/web eth0": second}


async def test_a_release_through_another_replica_is_not_missed(store, clock) -> None:
    async with replica(store, clock, SMALL) as one, replica(store, clock, seed=2) as two:
        await one.allocate("web")
        forget(two, next(one.view.assigned()))
        assert await two.release("web")
        # And now the view of `one` is late.
        assert await one.allocate("web")
    assert len(await check_store(store)) == 1


async def test_a_release_decided_on_a_late_view_hits_the_present_address_only(store, clock) -> None:
    gate = Gate()
    gate.open = True
    async with (
        replica(store, clock, SMALL) as one,
        replica(GatedStore(store, gate), clock, seed=2) as two,
    ):
        first = await one.allocate("web")
        await until(lambda: two.view.used("default") == 1)
        gate.open = False
        await one.release("web")
        assert await one.allocate("other", wanted=first) == first
        await one.allocate("web")
        async with asyncio.TaskGroup() as tasks:
            released = tasks.create_task(two.release("web"))
            while not released.done():
                await asyncio.sleep(0)
                # The first to wait is the watch, which stays late.
                if gate.waiting > 1:
                    gate.admit(1)
        assert released.result()
    assert await check_store(store) == {"shop/other eth0": first}


async def test_an_owner_elsewhere_is_a_conflict_until_released(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        address = await one.allocate("web", "a")
        with pytest.raises(Conflict, match=f"has {address} on node a; release it there first"):
            await one.allocate("web", "b")
        await one.release("web", "a")
        assert await one.allocate("web", "b")


async def test_static_addresses(store, clock) -> None:
    async with replica(store, clock, SMALL, cooldown_s=30) as one:
        assert await one.allocate("db", wanted="10.0.0.9") == "10.0.0.9"
        assert await one.allocate("db", wanted="10.0.0.9") == "10.0.0.9"
        with pytest.raises(Conflict, match=r"10\.0\.0\.9 belongs to shop/db eth0 on node a"):
            await one.allocate("web", wanted="10.0.0.9")
        with pytest.raises(Invalid, match="an edge of"):
            await one.allocate("web", wanted="10.0.0.15")
        with pytest.raises(Invalid, match="outside pool"):
            await one.allocate("web", wanted="10.9.0.1")
        await one.release("db")
        with pytest.raises(Retry, match="released a moment ago"):
            await one.allocate("web", wanted="10.0.0.9")


async def test_an_unknown_pool_is_not_found(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        with pytest.raises(NotFound, match="no pool 'blue'; known: default"):
            await one.allocate("web", pool="blue")


async def test_an_empty_block_goes_back_after_a_minute(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        await one.allocate("web")
        assert await one.reclaimer.once() == 0
        await one.release("web")
        await one.reclaimer.once()
        await clock.advance(59)
        assert await one.reclaimer.once() == 0
        await clock.advance(1)
        assert await one.reclaimer.once() == 1
        assert (await store.list(keys.BLOCKS)).items == ()
        assert await one.allocate("web", "b")
        assert {claim.node for claim in one.view.blocks()} == {"b"}


async def test_a_block_that_another_replica_just_used_is_not_given_back(store, clock) -> None:
    async with replica(store, clock, SMALL) as one, replica(store, clock, seed=2) as two:
        await one.allocate("web")
        await until(lambda: two.view.used("default") == 1)
        await one.release("web")
        await until(lambda: two.view.used("default") == 0)
        await two.reclaimer.once()
        await clock.advance(60)
        await one.allocate("web")
        forget(two, next(one.view.assigned()))
        assert await two.reclaimer.once() == 0
    assert len(await check_store(store)) == 1


async def test_after_a_relist_the_view_is_whole(store, clock) -> None:
    async with replica(store, clock, SMALL) as one, replica(store, clock, seed=2) as two:
        await fill(one, 7)
        store.compact()
        store.break_watches()
        await one.release("a-0")
        await until(lambda: two.view.used("default") == 6)
        assert {a.address for a in two.view.assigned()} == {a.address for a in one.view.assigned()}


async def test_an_unreachable_store_is_a_retry_and_nothing_is_lost(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        store.set_reachable(False)
        with pytest.raises(Retry):
            await one.allocate("web")
        store.set_reachable(True)
        assert len(set(await fill(one, 14))) == 14


async def test_an_expired_cool_down_lease_is_replaced(store, clock) -> None:
    async with replica(store, clock, SMALL, cooldown_s=30) as one:
        await one.allocate("web")
        await one.allocate("api")
        await one.release("web")
        await store.revoke((await store.list(keys.COOLING)).items[0].lease)
        assert await one.release("api")
    assert await check_store(store) == {}


async def test_a_value_nobody_can_read_leaves_its_address_taken(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        for n in range(1, 15):
            if n != 9:
                await one.allocate(f"w{n}", wanted=f"10.0.0.{n}")
        await store.put(keys.address_key("default", 0x0A000009), b"scribble")
        with pytest.raises(Retry, match="transactions lost"):
            await one.allocate("late")
