import random

import pytest

from identity import keys
from identity.allocate import Refer, Wanted
from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.identityd.allocator import Item
from services.identityd.references import release
from services.identityd.txns import collect, guarded, refer
from services.runtime.errors import Exhausted
from services.store.memory import MemoryStore
from tests.fakes.clock import FakeClock
from tests.fakes.identity_replica import (
    GRACE_S,
    QUARANTINE_S,
    SESSION_TTL_S,
    assert_consistent,
    replica,
)

# Beyond the jitter and the longest sleep of the collector.
LATE_S = 40.0


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
async def store(clock):
    async with MemoryStore(clock) as memory:
        yield memory


@pytest.fixture
async def one(store, clock):
    async with replica(store, clock, collect=True) as made:
        # Past the rest after a start.
        await clock.advance(SESSION_TTL_S + LATE_S)
        yield made


async def keep(one, clock, lease, seconds):
    """Advances time with the session kept alive."""
    while seconds > 0:
        await one.sessions.keep_alive([lease])
        await clock.advance(min(seconds, SESSION_TTL_S / 3))
        seconds -= SESSION_TTL_S / 3


async def test_an_identity_is_collected_after_the_grace_and_leaves_a_tombstone(store, one, clock):
    lease = await one.open()
    [number] = await one.allocate(lease, "k8s:app=web")
    await release(store, "node-a", [number])
    await clock.advance(GRACE_S - LATE_S)
    assert one.view.labels_of(number) is not None
    await clock.advance(2 * LATE_S)
    assert one.view.labels_of(number) is None
    assert not (await store.list("cilium/state/identities/")).items
    assert not (await store.list(keys.IDX_PREFIX)).items
    assert await store.get(keys.tomb_key(number)) is not None
    assert one.counts.collected == 1


async def test_a_reference_prevents_collection(store, one, clock):
    leases = [await one.open("node-a"), await one.open("node-b")]
    [number] = await one.allocate(leases[0], "k8s:app=web", node="node-a")
    await one.allocate(leases[1], "k8s:app=web", node="node-b")
    await release(store, "node-a", [number])
    await keep(one, clock, leases[1], 3 * GRACE_S)
    assert one.view.nodes_of(number) == ["node-b"]
    assert one.counts.collected == 0


async def test_a_lost_lease_releases_the_identity(store, one, clock):
    lease = await one.open()
    [number] = await one.allocate(lease, "k8s:app=web")
    await clock.advance(SESSION_TTL_S + LATE_S)
    assert one.view.nodes_of(number) == []
    assert one.view.labels_of(number) is not None
    await clock.advance(GRACE_S + LATE_S)
    assert one.view.labels_of(number) is None


async def test_a_reference_taken_within_the_grace_starts_it_anew(store, one, clock):
    lease = await one.open()
    [number] = await one.allocate(lease, "k8s:app=web")
    await release(store, "node-a", [number])
    await keep(one, clock, lease, GRACE_S - LATE_S)
    assert await one.allocate(lease, "k8s:app=web") == [number]
    await release(store, "node-a", [number])
    await clock.advance(GRACE_S - LATE_S)
    assert one.view.labels_of(number) is not None
    await clock.advance(2 * LATE_S)
    assert one.view.labels_of(number) is None


async def test_a_collected_number_is_not_reused_within_the_quarantine(store, clock):
    async with replica(store, clock, numbers=range(256, 257), collect=True) as one:
        await clock.advance(SESSION_TTL_S + LATE_S)
        [number] = await one.allocate(await one.open(), "k8s:app=web")
        await release(store, "node-a", [number])
        await clock.advance(GRACE_S + LATE_S)
        assert one.view.labels_of(number) is None
        other = Item(("k8s:app=other",))
        for _ in range(3):
            [refused] = await one.allocator.allocate("node-a", await one.open(), [other])
            assert isinstance(refused, Exhausted)
            assert "0 are in use and 1 in quarantine" in str(refused)
            await clock.advance(QUARANTINE_S / 3 - LATE_S)
        await clock.advance(4 * LATE_S)
        assert await one.allocate(await one.open(), "k8s:app=other") == [number]


async def test_with_no_number_left_the_oldest_in_quarantine_is_reused_but_not_at_once(store, clock):
    pressed_s = 30.0
    numbers = range(256, 266)
    async with replica(
        store, clock, numbers=numbers, collect=True, pressed_quarantine_s=pressed_s
    ) as one:
        await clock.advance(SESSION_TTL_S + LATE_S)
        lease = await one.open()
        numbers = await one.allocate(lease, *(f"k8s:app=app{i}" for i in range(10)))
        await release(store, "node-a", [NumericIdentity(n) for n in numbers[:2]])
        # All numbers are taken, so the grace is short.
        await clock.advance(LATE_S)
        assert one.view.in_quarantine == 2
        other = Item(("k8s:app=other",))
        gone_at = clock.monotonic_s()
        while isinstance((await one.allocator.allocate("node-a", lease, [other]))[0], Exhausted):
            assert clock.monotonic_s() < gone_at + pressed_s
            await clock.advance(1)
        assert one.counts.reused_early == 1
        [number] = await one.allocate(lease, "k8s:app=other")
        assert number in numbers[:2]
        assert await store.get(keys.tomb_key(NumericIdentity(number))) is None
        await assert_consistent(store)


async def test_a_new_leader_of_the_store_suspends_collecting(store, one, clock):
    lease = await one.open()
    [number] = await one.allocate(lease, "k8s:app=web")
    await release(store, "node-a", [number])
    await clock.advance(GRACE_S - LATE_S)
    store.elect()
    await clock.advance(SESSION_TTL_S - LATE_S)
    assert one.view.labels_of(number) is not None
    await clock.advance(3 * LATE_S)
    assert one.view.labels_of(number) is None


async def test_a_stopped_collector_lays_no_tombstone_that_is_about_to_end(store, one, clock):
    lease = await one.open()
    [number] = await one.allocate(lease, "k8s:app=web")
    await release(store, "node-a", [number])
    await clock.advance(1)
    item = one.view.collectable(number)
    quarantine, guard = await store.grant(int(QUARANTINE_S)), keys.guard_key(7)
    await store.put(guard, b"", await store.grant(16))
    await clock.advance(20)
    assert not (await store.txn(guarded(guard, [item], quarantine))).succeeded
    assert await store.get(keys.tomb_key(number)) is None


async def test_a_returning_node_gets_its_number_back_from_the_quarantine(store, one, clock):
    [number] = await one.allocate(await one.open(), "k8s:app=web")
    await release(store, "node-a", [number])
    await clock.advance(GRACE_S + LATE_S)
    lease = await one.open()
    other, same = await one.allocator.allocate(
        "node-a",
        lease,
        [
            Item(("k8s:app=other",), NumericIdentity(number)),
            Item(("k8s:app=web",), NumericIdentity(number)),
        ],
    )
    assert (same.number, same.remapped) == (number, False)
    assert (other.number != number, other.remapped) == (True, True)
    assert await store.get(keys.tomb_key(number)) is None
    await assert_consistent(store)


async def test_a_replica_that_just_started_collects_nothing_for_one_session_lifetime(store, clock):
    async with replica(store, clock) as first:
        [number] = await first.allocate(await first.open(), "k8s:app=web")
        await release(store, "node-a", [number])
    async with replica(store, clock, collect=True) as one:
        await clock.advance(SESSION_TTL_S - LATE_S)
        assert one.view.labels_of(number) is not None
        await clock.advance(GRACE_S + LATE_S)
        assert one.view.labels_of(number) is None


async def test_losing_many_references_at_once_suspends_collecting(store, one, clock):
    stay, go = await one.open("node-a"), await one.open("node-b")
    texts = [f"k8s:app=app{i}" for i in range(200)]
    await one.allocate(stay, *texts[:100], node="node-a")
    await one.allocate(go, *texts[100:], node="node-b")
    await one.allocate(stay, "k8s:app=idle", node="node-a")
    [idle] = await one.allocate(stay, "k8s:app=idle", node="node-a")
    await release(store, "node-a", [NumericIdentity(idle)])
    await keep(one, clock, stay, GRACE_S - 3 * LATE_S)
    await store.revoke(go)
    await keep(one, clock, stay, SESSION_TTL_S - 3 * LATE_S)
    assert one.counts.collected == 0
    # The nodes that came back renewed their references; the rest is collected.
    await one.allocate(await one.open("node-b"), *texts[100:150], node="node-b")
    await keep(one, clock, stay, GRACE_S + 6 * LATE_S)
    assert one.counts.collected >= 1
    assert all(one.view.nodes_of(n) == [] or one.view.labels_of(n) for n in range(256, 65536))


async def test_giving_many_references_back_suspends_nothing(store, one, clock):
    lease = await one.open("node-a")
    numbers = await one.allocate(lease, *(f"k8s:app=app{i}" for i in range(200)))
    await release(store, "node-a", [NumericIdentity(n) for n in numbers])
    await keep(one, clock, lease, GRACE_S + LATE_S)
    assert one.counts.collected == 200


async def test_two_replicas_collect_side_by_side_without_harm(store, one, clock):
    async with replica(store, clock, seed=1, collect=True) as other:
        await clock.advance(SESSION_TTL_S + LATE_S)
        lease = await one.open()
        numbers = await one.allocate(lease, *(f"k8s:app=app{i}" for i in range(300)))
        await release(store, "node-a", [NumericIdentity(n) for n in numbers[:40]])
        await keep(one, clock, lease, GRACE_S + LATE_S)
        assert one.counts.collected + other.counts.collected == 40
        assert len(await assert_consistent(store)) == 260


async def test_an_identity_another_writer_made_is_not_collected(store, one, clock):
    labels = Labels.parse(["k8s:app=foreign"])
    await store.put(keys.id_key(NumericIdentity(300)), labels.canonical().encode())
    await clock.advance(5 * GRACE_S)
    assert one.view.labels_of(NumericIdentity(300)) == labels


async def test_of_a_reference_and_a_collection_only_the_first_succeeds(store, one, clock):
    lease = await one.open()
    [number] = await one.allocate(lease, "k8s:app=web")
    await release(store, "node-a", [number])
    await clock.advance(1)
    item = one.view.collectable(number)
    labels = one.view.labels_of(number)
    reference = refer(Refer(number, Wanted(labels, labels.digest())), "node-b", lease)
    assert (await store.txn(reference)).succeeded
    assert not (await store.txn(collect(item, lease))).succeeded
    await release(store, "node-b", [number])
    assert (await store.txn(collect(item, lease))).succeeded
    assert not (await store.txn(reference)).succeeded


async def test_a_lost_quarantine_lease_is_replaced(store, one, clock):
    lease = await one.open()
    first, second = await one.allocate(lease, "k8s:app=a", "k8s:app=b")
    await release(store, "node-a", [first])
    await clock.advance(1)
    await release(store, "node-a", [second])
    await clock.advance(GRACE_S + LATE_S)
    tombs = [await store.get(keys.tomb_key(NumericIdentity(n))) for n in (first, second)]
    assert all(tomb is not None and tomb.lease for tomb in tombs)


@pytest.mark.parametrize("seed", range(6))
async def test_no_order_of_events_gives_a_set_two_numbers_or_a_number_two_sets(store, clock, seed):
    chooser = random.Random(seed)
    numbers = range(256, 256 + 24)
    nodes = [f"node-{i}" for i in range(3)]
    freed: dict[int, tuple[float, str]] = {}
    held: dict[str, int] = {}
    async with (
        replica(store, clock, seed=seed, numbers=numbers, collect=True) as one,
        replica(store, clock, seed=seed + 1, numbers=numbers, collect=True) as other,
    ):
        for _ in range(120):
            # What is found collected after a step was collected no earlier than this.
            began = clock.monotonic_s()
            member = chooser.choice([one, other])
            node = chooser.choice(nodes)
            match chooser.randrange(4):
                case 0 | 1:
                    lease = await member.open(node)
                    texts = [f"k8s:app={chooser.randrange(16)}" for _ in range(4)]
                    await member.allocator.allocate(node, lease, [Item((t,)) for t in texts])
                case 2:
                    gone = [NumericIdentity(chooser.choice(numbers)) for _ in range(6)]
                    await release(store, node, gone)
                case 3:
                    await clock.advance(chooser.choice([1, 100, 400]))
            now = await assert_consistent(store)
            for labels, number in now.items():
                when, before = freed.get(number, (-QUARANTINE_S, labels))
                if labels not in held:
                    assert before == labels or clock.monotonic_s() >= when + QUARANTINE_S
            freed |= {n: (began, s) for s, n in held.items() if s not in now}
            held = now
        assert one.counts.collected + other.counts.collected > 0
