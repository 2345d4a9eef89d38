"""Windows, journals and collection on the memory store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipam import keys
from ipam.window import Entry
from services.ipamd import pools
from services.runtime.config import PoolConfig
from services.runtime.errors import Conflict, Exhausted, Invalid, NotFound, Retry
from services.store.memory import MemoryStore
from tests.fakes.address_service import check_store, replica
from tests.fakes.clock import FakeClock
from tests.fakes.gated_store import Gate, GatedStore
from tests.fakes.window_node import WindowNode

SMALL = {"default": PoolConfig(cidrs=("10.0.0.0/27",), block_size=29)}  # 30 addresses, 4 blocks
DUAL = {"default": PoolConfig(cidrs=("10.0.0.0/24", "fd00::/64"), block_size=28)}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def store(clock: FakeClock) -> AsyncIterator[MemoryStore]:
    async with MemoryStore(clock) as memory:
        yield memory


async def windowed(one, name: str, clock: FakeClock) -> WindowNode:
    node = WindowNode(name, clock)
    for _ in range(3):
        await node.sync(one)
    return node


async def use_up(one, given: set[str]) -> None:
    """Until the service refuses."""
    for n in range(len(given), 100):
        given.add(await one.allocate(f"theirs-{n}", "z"))


async def test_a_node_is_given_windows_and_hands_out_both_families_alone(store, clock) -> None:
    async with replica(store, clock, DUAL) as one:
        node = await windowed(one, "a", clock)
        revision = store.revision
        first = node.take("web")
        assert first is not None
        assert first.startswith("10.0.0.1,fd00::")
        assert store.revision == revision
        await node.tell(one)
    assert await check_store(store) == {"shop/web eth0": first}


async def test_telling_twice_is_telling_once(store, clock) -> None:
    async with replica(store, clock, DUAL) as one:
        node = await windowed(one, "a", clock)
        node.take("web")
        pending = list(node.local.pending)
        await node.tell(one)
        before = await check_store(store)
        node.local.pending = pending
        await node.tell(one)
        assert await check_store(store) == before
        node.free("web")
        pending = list(node.local.pending)
        await node.tell(one)
        node.local.pending = pending
        await node.tell(one)
    assert await check_store(store) == {}
    assert node.lost == []


async def test_a_replica_that_has_not_heard_of_the_window_takes_its_journal(store, clock) -> None:
    async with replica(store, clock, SMALL) as one, replica(store, clock, seed=2) as late:
        node = await windowed(one, "a", clock)
        given = node.take("web")
        for claim in tuple(late.view.blocks()):
            late.view.remove_block(claim.pool, claim.block, claim.revision)
        await node.tell(late)
    assert node.lost == []
    assert await check_store(store) == {"shop/web eth0": given}


async def test_given_and_taken_back_in_one_batch_leaves_nothing(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        node = await windowed(one, "a", clock)
        for _ in range(3):
            node.take("web")
            node.free("web")
        last = node.take("web")
        await node.tell(one)
    assert await check_store(store) == {"shop/web eth0": last}


async def test_the_service_never_hands_out_of_a_window(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        node = await windowed(one, "a", clock)
        kept = {ip for n in range(3) if (ip := node.take(f"mine-{n}"))}
        given: set[str] = set()
        with pytest.raises(Retry, match="in nodes' windows"):
            await use_up(one, given)
        assert kept
        assert kept.isdisjoint(given)


async def test_an_exhausted_pool_calls_windows_back_and_every_address_is_given(
    store, clock
) -> None:
    async with replica(store, clock, SMALL) as one:
        nodes = [await windowed(one, name, clock) for name in "ab"]
        mine = nodes[0].take("mine")
        given: set[str] = set()
        with pytest.raises(Retry):
            await use_up(one, given)
        for node in nodes:
            await node.tell(one)
            await node.sync(one)  # is asked for its windows
            await node.sync(one)  # says that it has narrowed them
        with pytest.raises(Exhausted, match="30 of 30"):
            await use_up(one, given)
        assert len({*given, mine}) == 30


async def test_a_static_address_in_anothers_window_is_refused_with_the_remedy(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        await windowed(one, "a", clock)
        with pytest.raises(
            Conflict, match=r"window of 10\.0\.0\.0/29 that node a .* local = false"
        ):
            await one.allocate("db", "b", wanted="10.0.0.2")


async def test_a_pool_without_windows_gives_none(store, clock) -> None:
    pool = {"default": PoolConfig(cidrs=("10.0.0.0/27",), block_size=29, local=False)}
    async with replica(store, clock, pool) as one:
        node = await windowed(one, "a", clock)
        assert node.local.windows == {}
        assert await one.allocate("db", "b", wanted="10.0.0.2") == "10.0.0.2"


async def test_a_node_that_lost_its_disk_gets_its_windows_with_what_is_used(store, clock) -> None:
    async with replica(store, clock, SMALL, cooldown_s=0) as one:
        node = await windowed(one, "a", clock)
        first = node.take("web")
        await node.tell(one)
        reborn = await windowed(one, "a", clock)
        assert set(reborn.local.windows) >= set(node.local.windows)
        assert reborn.has() == {"shop/web eth0": first}
        assert reborn.take("other") != first


async def test_a_narrowed_window_is_the_services_and_stays_so(store, clock) -> None:
    async with replica(store, clock, SMALL) as one, replica(store, clock, seed=2) as two:
        node = await windowed(one, "a", clock)
        (key, window), *_ = node.local.windows.items()
        before = list(node.local.windows.values())
        for each in before:
            node.local.windows[each.pool, each.block] = type(window)(
                each.pool, each.block, each.generation, 0
            )
        await node.sync(one, wishing=False)
        assert node.local.windows == {}
        # A late word of the larger window changes nothing.
        for each in before:
            node.local.windows[each.pool, each.block] = each
        await two.windows.sync("a", [], [])
        claim = one.view.claim_of(*key)
        assert claim is not None
        assert claim.window == 0


async def test_a_range_with_windows_is_disabled_then_dropped(store, clock) -> None:
    wide = PoolConfig(cidrs=("10.0.0.0/28", "10.0.1.0/28"), block_size=29)
    narrow = PoolConfig(cidrs=("10.0.1.0/28",), block_size=29)
    draining = PoolConfig(cidrs=wide.cidrs, block_size=29, disabled=("10.0.0.0/28",))
    async with replica(store, clock, {"default": wide}) as one:
        node = await windowed(one, "a", clock)
        with pytest.raises(Invalid, match=r"takes away . blocks in which nodes keep windows"):
            await pools.put(store, "default", narrow, None)
        pool, _, revision = await pools.put(store, "default", draining, None)
        one.view.put_pool(pool, revision)
        for _ in range(3):
            await node.sync(one)
        assert {str(w.block) for w in node.local.windows.values()} <= {"10.0.1.0/29", "10.0.1.8/29"}
        await pools.put(store, "default", narrow, None)
    assert (await store.list(keys.POOLS)).items != ()


# ------------------------------------------------------------------ what nobody owns


async def test_what_a_node_does_not_know_twice_is_released(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        node = await windowed(one, "a", clock)
        node.take("kept")
        node.take("leaked")
        await node.tell(one)
        node.forget("leaked")
        assert await node.report(one) == (1, 0)
        assert [leak.reason for leak in one.collector.leaks()] == ["node a does not know the owner"]
        assert await node.report(one) == (0, 1)
    assert set(await check_store(store)) == {"shop/kept eth0"}


async def test_an_owner_that_asks_just_now_is_no_leak(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        await one.allocate("web", "a")
        asking = {("shop", "web", "eth0"): frozenset()}
        for _ in range(3):
            assert await one.collector.report("a", asking) == (0, 0)


async def test_an_address_given_again_meanwhile_is_suspected_anew(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        first = await one.allocate("web", "a")
        assert await one.collector.report("a", {}) == (1, 0)
        await one.release("web", "a")
        assert await one.allocate("web", "a", wanted=first) == first
        assert await one.collector.report("a", {}) == (1, 0)
        assert await one.collector.report("a", {}) == (0, 1)


async def pass_time(one, clock: FakeClock, seconds: int, *alive: WindowNode) -> None:
    for _ in range(seconds // 10):
        await clock.advance(10)
        for node in alive:
            await node.sync(one, wishing=False)
        await one.collector.once()


async def test_a_dead_nodes_addresses_and_blocks_come_back(store, clock) -> None:
    async with replica(store, clock, SMALL, gone_s=120) as one:
        dead, alive = await windowed(one, "dead", clock), await windowed(one, "alive", clock)
        dead.take("web")
        await dead.tell(one)
        kept = await one.allocate("theirs", "alive")
        await pass_time(one, clock, 100, alive)
        assert "shop/web eth0" in await check_store(store)
        assert [leak.row.node for leak in one.collector.leaks()] == ["dead"]
        await pass_time(one, clock, 60, alive)
        assert await check_store(store) == {"shop/theirs eth0": kept}
        assert {claim.node for claim in one.view.blocks()} == {"alive"}


async def test_nobody_is_dead_while_nobody_is_heard(store, clock) -> None:
    """Then it is this replica that is cut off."""
    async with replica(store, clock, SMALL, gone_s=120) as one:
        node = await windowed(one, "a", clock)
        node.take("web")
        await node.tell(one)
        await pass_time(one, clock, 600)
        assert set(await check_store(store)) == {"shop/web eth0"}


async def test_time_without_the_store_does_not_count(store, clock) -> None:
    gate = Gate()
    gate.open = True
    async with replica(GatedStore(store, gate), clock, SMALL, gone_s=120) as one:
        a, b = await windowed(one, "a", clock), await windowed(one, "b", clock)
        a.take("web")
        await a.tell(one)
        await one.collector.once()
        await clock.advance(3600)  # nothing was asked meanwhile
        await b.sync(one)
        await one.collector.once()
        assert one.collector.dead() == []
        assert set(await check_store(store)) == {"shop/web eth0"}


async def test_a_node_that_comes_back_keeps_what_nobody_else_was_given(store, clock) -> None:
    async with replica(store, clock, SMALL, gone_s=120) as one:
        back, alive = await windowed(one, "back", clock), await windowed(one, "alive", clock)
        mine = back.take("mine")
        await back.tell(one)
        await pass_time(one, clock, 200, alive)
        assert await check_store(store) == {}
        back.local.pending = [*entries_of(back)]
        await back.sync(one)
        await back.tell(one)
        assert await check_store(store) == {"shop/mine eth0": mine}
        assert back.lost == []


async def test_an_address_that_another_has_by_then_is_lost_in_words(store, clock) -> None:
    async with replica(store, clock, SMALL, gone_s=120) as one:
        back, alive = await windowed(one, "back", clock), await windowed(one, "alive", clock)
        mine = back.take("mine")
        await back.tell(one)
        await pass_time(one, clock, 200, alive)
        await one.allocate("theirs", "alive", wanted=mine)
        back.local.pending = [*entries_of(back)]
        await back.tell(one)
        assert len(back.lost) == 1
        assert "belongs to shop/theirs eth0 on node alive" in back.lost[0]


def entries_of(node: WindowNode) -> list:
    return [Entry(holding, False, 0.0) for holding in node.local.held.values()]


async def test_a_node_is_forgotten_by_hand_when_it_is_silent_or_forced(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        node = await windowed(one, "a", clock)
        node.take("web")
        await node.tell(one)
        with pytest.raises(Conflict, match="heard from 0 s ago: stop its agent first"):
            await one.collector.forget_by_hand("a", force=False)
        with pytest.raises(NotFound, match="no node 'b'"):
            await one.collector.forget_by_hand("b", force=False)
        assert (await one.collector.forget_by_hand("a", force=True))[0] == 1
    assert await check_store(store) == {}
    assert (await store.list(keys.BLOCKS)).items == ()


# ------------------------------------------------------------------ kept addresses


async def test_a_kept_address_waits_for_its_owner_on_whatever_node(store, clock) -> None:
    async with replica(store, clock, DUAL) as one:
        first = await one.allocate("db", "a", uid="1", retain_s=600)
        assert await one.release("db", "a", uid="1")
        assert not await one.release("db", "a", uid="1")
        with pytest.raises(Conflict, match="is kept for shop/db"):
            await one.allocate("thief", "b", wanted=first.partition(",")[0])
        assert await one.allocate("db", "b", uid="2", retain_s=600) == first
    assert await check_store(store) == {"shop/db eth0": first}


async def test_a_kept_address_is_free_when_its_time_is_up(store, clock) -> None:
    async with replica(store, clock, SMALL) as one:
        await one.allocate("db", "a", retain_s=600)
        await one.release("db", "a")
        await clock.advance(599)
        await one.collector.once()
        assert set(await check_store(store)) == {"shop/db eth0"}
        await clock.advance(2)
        await one.collector.once()
    assert await check_store(store) == {}


# ------------------------------------------------------------------ any order of it all


TINY = {"default": PoolConfig(cidrs=("10.0.0.0/28",), block_size=30)}  # 14 addresses, 4 blocks

steps = st.lists(
    st.tuples(
        st.integers(0, 1),  # replica
        st.sampled_from(
            ["sync", "sync", "tell", "tell", "take", "take", "take", "free", "ask", "give", "tidy"]
        ),
        st.integers(0, 1),  # node
        st.integers(0, 2),  # owner
    ),
    max_size=40,
)


class Cluster:
    """Two nodes with windows, and an owner book: who was told that he has which address."""

    def __init__(self, clock: FakeClock) -> None:
        self.nodes = [WindowNode(name, clock) for name in "ab"]
        self.told: dict[str, str] = {}
        self.turns = [asyncio.Lock(), asyncio.Lock()]

    def tell(self, name: str, ip: str) -> None:
        assert self.told.get(name, ip) == ip
        assert ip not in {other for who, other in self.told.items() if who != name}
        self.told[name] = ip

    async def perform(self, gate: Gate, one, what: str, which: int, n: int) -> None:
        node = self.nodes[which]
        await gate.pass_through()
        # What a node does is one after another, as in its agent.
        async with self.turns[which]:
            local, asked = f"{node.name}-{n}", f"{node.name}-asked-{n}"
            with suppress(Retry, Exhausted, Conflict):
                if what == "take" and (ip := node.take(local)) is not None:
                    self.tell(local, ip)
                elif what == "free" and self.told.pop(local, None):
                    node.free(local)
                elif what == "sync":
                    await node.sync(one)
                elif what == "tell":
                    await node.tell(one)
                elif what == "ask":
                    self.tell(asked, await one.allocate(asked, node.name))
                elif what == "give":
                    self.told.pop(asked, None)
                    await one.release(asked, node.name)
                elif what == "tidy":
                    await one.reclaimer.once()


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps, st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(0, 3))
def test_no_interleaving_of_windows_and_service_gives_an_address_twice(todo, order, lost) -> None:
    asyncio.run(_play(todo, order, lost))


async def _play(todo, order: list[int], lost: int) -> None:
    clock, gate = FakeClock(), Gate()
    cluster = Cluster(clock)
    async with MemoryStore(clock) as memory, AsyncExitStack() as stack:
        await pools.ensure(memory, TINY)
        gated = [GatedStore(memory, gate) for _ in range(2)]
        gate.open = True
        for each in gated:
            each.lose_answers, each.error = lost, Retry("the answer was lost")
        replicas = [
            await stack.enter_async_context(replica(each, clock, seed=n, empty_for_s=0))
            for n, each in enumerate(gated)
        ]
        gate.open = False
        async with asyncio.TaskGroup() as tasks:
            work = [
                tasks.create_task(cluster.perform(gate, replicas[r], what, which, n))
                for r, what, which, n in todo
            ]
            await _admit_until_done(work, gate, order)
        gate.open = True
        for each in gated:
            each.lose_answers = 0
        for node in cluster.nodes:
            await node.tell(replicas[0])
            assert node.lost == []
        held = await check_store(memory)
    for name, address in cluster.told.items():
        assert held[f"shop/{name} eth0"] == address


async def _admit_until_done(work: list[asyncio.Task[None]], gate: Gate, order: list[int]) -> None:
    turn = 0
    while not all(task.done() for task in work):
        for _ in range(8):
            await asyncio.sleep(0)
        if gate.waiting:
            gate.admit(order[turn % len(order)])
            turn += 1
