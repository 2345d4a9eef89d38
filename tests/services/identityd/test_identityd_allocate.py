import asyncio
import random

import pytest

from identity import keys
from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.identityd.allocator import Allocated, Item
from services.runtime.clock import SystemClock
from services.runtime.errors import Exhausted, Invalid, NotFound, Retry
from services.store.memory import MemoryStore
from services.store.model import LeaseId
from tests.fakes.clock import FakeClock
from tests.fakes.identity_replica import assert_consistent, replica, until

WEB = Item(("k8s:app=web", "k8s:io.kubernetes.pod.namespace=shop", "k8s:pod-template-hash=5f7"))
WEB_STORED = (
    "k8s:app=web;k8s:io.cilium.k8s.policy.cluster=default;k8s:io.kubernetes.pod.namespace=shop;"
)


@pytest.fixture
async def store():
    async with MemoryStore(SystemClock()) as memory:
        yield memory


@pytest.fixture
async def one(store):
    async with replica(store, SystemClock()) as made:
        yield made


async def test_a_new_label_set_gets_a_number_with_its_keys_in_one_transaction(store, one):
    lease = await one.open()
    before = store.revision
    [result] = await one.allocator.allocate("node-a", lease, [WEB])
    assert store.revision == before + 1
    assert result.labels.canonical() == WEB_STORED
    assert result.number in range(256, 65536)
    assert not result.remapped
    digest = result.labels.digest()
    assert (await store.get(keys.id_key(result.number))).value == WEB_STORED.encode()
    assert (await store.get(keys.idx_key(digest))).value == str(result.number).encode()
    reference = await store.get(keys.ref_key(result.number, "node-a"))
    assert (reference.value, reference.lease) == (digest.encode(), lease)


async def test_the_same_set_has_the_same_number_on_every_node_and_each_time(one):
    numbers = set()
    for node in ("node-a", "node-b", "node-a"):
        lease = await one.open(node)
        results = await one.allocator.allocate(node, lease, [WEB, WEB])
        numbers |= {result.number for result in results}
    assert len(numbers) == 1
    assert one.counts.created == 1
    [number] = numbers
    await until(lambda: one.view.nodes_of(number) == ["node-a", "node-b"], "both references")


async def test_one_bad_item_does_not_fail_its_neighbours(one):
    lease = await one.open()
    bad = [
        (),
        ("no label;",),
        ("any:pod-template-hash=1", "any:controller-uid=2"),
        ("k8s:app=x", "k8s:io.cilium.k8s.policy.cluster=elsewhere"),
        ("cidr:10.0.0.0/8", "reserved:world"),
        ("reserved:host", "k8s:app=x"),
        ("reserved:remote-node", "k8s:app=x"),
        ("k8s:a=1", "any:a=2"),
        ("container:big=" + "x" * 20_000,),
    ]
    results = await one.allocator.allocate(
        "node-a", lease, [WEB, *(Item(texts) for texts in bad), WEB]
    )
    assert results[0].number == results[-1].number
    assert all(isinstance(result, Invalid) for result in results[1:-1])
    for result, words in zip(
        results[1:-1],
        [
            "there is none",
            "remove them",
            "give the workload a label that",
            "names another cluster than this one, 'default'",
            "local to a node",
            "mix source 'reserved'",
            "mix source 'reserved'",
            "given twice",
            "too large",
        ],
        strict=True,
    ):
        assert words in str(result)


async def test_a_workload_without_a_kubernetes_label_gets_no_cluster_label(one):
    lease = await one.open()
    [result] = await one.allocator.allocate("node-a", lease, [Item(("container:app=x",))])
    assert result.labels == Labels.parse(["container:app=x"])


async def test_a_reserved_label_maps_to_its_number_without_a_write(store, one):
    lease = await one.open()
    before = store.revision
    items = [Item(("reserved:health",)), Item(("reserved:init",), NumericIdentity(300))]
    health, init = await one.allocator.allocate("node-a", lease, items)
    assert (health.number, health.remapped) == (4, False)
    assert (init.number, init.remapped) == (5, True)
    assert store.revision == before


async def test_a_thousand_sets_in_one_call_get_a_thousand_numbers(store, one):
    lease = await one.open()
    texts = [f"k8s:app=app{i}" for i in range(1000)]
    numbers = await one.allocate(lease, *texts)
    assert len(set(numbers)) == 1000
    assert await one.allocate(lease, *texts) == numbers
    assert len(await assert_consistent(store)) == 1000


async def test_a_burst_of_ten_thousand_from_many_nodes_gives_each_set_one_number(store, one):
    leases = {f"node-{i}": await one.open(f"node-{i}") for i in range(20)}
    got = {}

    async def allocate(node, lease, texts):
        got[node] = dict(zip(texts, await one.allocate(lease, *texts, node=node), strict=True))

    async with asyncio.TaskGroup() as tasks:
        for i, (node, lease) in enumerate(leases.items()):
            # Half of each node's sets are every node's.
            own = [f"k8s:app=own-{i}-{k}" for k in range(490)]
            shared = [f"k8s:app=shared-{k}" for k in range(200)]
            tasks.create_task(allocate(node, lease, own + shared))
    by_set = await assert_consistent(store)
    assert len(by_set) == 20 * 490 + 200
    for numbers in got.values():
        for text, number in numbers.items():
            assert by_set[f"{text};k8s:io.cilium.k8s.policy.cluster=default;"] == number


@pytest.mark.parametrize("seed", range(5))
async def test_two_replicas_racing_on_the_same_sets_never_give_two_numbers(store, seed):
    clock = SystemClock()
    # Few numbers, so that they also race for the same ones.
    numbers = range(256, 256 + 60)
    async with (
        replica(store, clock, seed=seed, numbers=numbers) as one,
        replica(store, clock, seed=seed, numbers=numbers) as other,
    ):
        leases = [await one.open("node-a"), await other.open("node-b")]
        texts = [f"k8s:app=app{i}" for i in range(50)]
        order = random.Random(seed)
        got = []

        async def allocate(member, lease, node):
            for _ in range(3):
                shuffled = order.sample(texts, len(texts))
                numbers = await member.allocate(lease, *shuffled, node=node)
                got.append(dict(zip(shuffled, numbers, strict=True)))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(allocate(one, leases[0], "node-a"))
            tasks.create_task(allocate(other, leases[1], "node-b"))
        assert all(each == got[0] for each in got)
        assert len(await assert_consistent(store)) == 50
        assert one.counts.created + other.counts.created == 50


async def test_a_replica_whose_view_lags_learns_from_the_transaction_that_fails(store, one):
    lease = await one.open()
    numbers = await one.allocate(lease, "k8s:app=a", "k8s:app=b")
    async with replica(store, SystemClock()) as behind:
        # Forgetting is what a view that lags looks like.
        for text in ("k8s:app=a", "k8s:app=b"):
            labels = Labels.parse([text, "k8s:io.cilium.k8s.policy.cluster=default"])
            behind.view.corrected(labels.digest(), None)
        assert await behind.allocate(lease, "k8s:app=a", "k8s:app=b") == numbers
        assert behind.counts.conflicts == 2
        assert len(behind.view.free) == 65280 - 2


# ------------------------------------------------------------------ adoption


async def test_a_returning_node_keeps_the_number_it_had_when_it_is_free(one):
    lease = await one.open()
    [result] = await one.allocator.allocate(
        "node-a", lease, [Item(("k8s:app=web",), NumericIdentity(4711))]
    )
    assert (result.number, result.remapped) == (4711, False)


async def test_a_number_taken_by_other_labels_is_remapped(one):
    lease = await one.open()
    [taken] = await one.allocate(lease, "k8s:app=web")
    [result] = await one.allocator.allocate(
        "node-a", lease, [Item(("k8s:app=db",), NumericIdentity(taken))]
    )
    assert result.number != taken
    assert result.remapped


async def test_a_set_that_has_another_number_by_now_is_remapped_to_it(one):
    lease = await one.open()
    [known] = await one.allocate(lease, "k8s:app=web")
    [result] = await one.allocator.allocate(
        "node-a", lease, [Item(("k8s:app=web",), NumericIdentity(known + 1))]
    )
    assert (result.number, result.remapped) == (known, True)


@pytest.mark.parametrize("previous", [1, 255, 65536, 1 << 24])
async def test_a_number_that_is_not_this_clusters_to_give_is_remapped(one, previous):
    lease = await one.open()
    [result] = await one.allocator.allocate(
        "node-a", lease, [Item(("k8s:app=web",), NumericIdentity(previous))]
    )
    assert result.number in range(256, 65536)
    assert result.remapped


async def test_a_number_another_replica_took_unseen_is_remapped(store):
    async with (
        replica(store, SystemClock(), seed=1) as one,
        replica(store, SystemClock(), seed=2) as other,
    ):
        lease = await one.open()
        wanted = NumericIdentity(4711)
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(
                one.allocator.allocate("node-a", lease, [Item(("k8s:app=a",), wanted)])
            )
            second = tasks.create_task(
                other.allocator.allocate("node-a", lease, [Item(("k8s:app=b",), wanted)])
            )
        results = [*first.result(), *second.result()]
        assert sorted(result.remapped for result in results) == [False, True]
        assert {r.number == wanted for r in results} == {True, False}
        await assert_consistent(store)


# ------------------------------------------------------------------ what can go wrong


async def test_exhaustion_says_how_many_are_in_use_and_what_to_do(store):
    async with replica(store, SystemClock(), numbers=range(256, 260)) as small:
        lease = await small.open()
        await small.allocate(lease, *(f"k8s:app={i}" for i in range(4)))
        await until(lambda: small.view.in_use == 4, "the view has seen all four")
        [refused, known] = await small.allocator.allocate(
            "node-a", lease, [Item(("k8s:app=5",)), Item(("k8s:app=1",))]
        )
        assert isinstance(refused, Exhausted)
        assert "of 4, 4 are in use and 0 in quarantine" in str(refused)
        assert isinstance(known, Allocated)


async def test_a_dead_lease_tells_the_node_to_open_a_new_session():
    clock = FakeClock()
    async with MemoryStore(clock) as store, replica(store, clock) as one:
        dead = await one.open("node-a")
        await store.revoke(dead)
        with pytest.raises(NotFound, match=f"lease {dead} of node 'node-a' is gone; open a new"):
            await one.allocate(dead, "k8s:app=web")
        assert len(one.view.free) == 65280
        assert await one.allocate(await one.open("node-a"), "k8s:app=web")


async def test_a_dead_lease_does_not_harm_other_nodes_in_the_same_transaction(store, one):
    dead, alive = await one.open("node-a"), await one.open("node-b")
    await store.revoke(dead)
    outcomes = {}

    async def allocate(node, lease):
        try:
            outcomes[node] = await one.allocate(lease, f"k8s:app={node}", node=node)
        except NotFound:
            outcomes[node] = "gone"

    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(allocate("node-a", dead))
            tasks.create_task(allocate("node-b", alive))
    assert outcomes["node-a"] == "gone"
    assert len(outcomes["node-b"]) == 1


async def test_an_unreachable_store_is_a_retry_and_loses_no_number(store, one):
    lease = await one.open()
    store.set_reachable(False)
    with pytest.raises(Retry):
        await one.allocate(lease, "k8s:app=web")
    store.set_reachable(True)
    assert len(one.view.free) == 65280
    assert await one.allocate(lease, "k8s:app=web")


async def test_nothing_is_allocated_before_the_store_was_read(store):
    async with replica(store, SystemClock(), follow=False, sync_wait_s=0.01) as blind:
        lease = await blind.open()
        before = store.revision
        with pytest.raises(Retry, match="has not read the identities"):
            await blind.allocate(lease, "k8s:app=web")
        assert store.revision == before


async def test_a_value_no_label_set_can_be_read_from_still_occupies_its_number(store):
    await store.put(keys.id_key(NumericIdentity(256)), b"nonsense")
    async with replica(store, SystemClock(), numbers=range(256, 258)) as one:
        assert await one.allocate(await one.open(), "k8s:app=web") == [257]


async def test_lease_numbers_that_are_none_do_not_reach_the_store(one):
    with pytest.raises(Invalid, match="open a session first"):
        await one.sessions.keep_alive([LeaseId(0)])


async def test_configured_identities_are_answered_without_a_key_in_the_store(store, one):
    lease = await one.open()
    before = store.revision
    results = await one.allocator.allocate(
        "node-a",
        lease,
        [
            Item(("k8s:app=etcd", "k8s:io.cilium.fixed-identity=kv-store")),
            Item(
                (
                    "k8s:k8s-app=kube-dns",
                    "k8s:io.cilium.k8s.policy.serviceaccount=coredns",
                    "k8s:io.kubernetes.pod.namespace=kube-system",
                    "k8s:pod-template-hash=1",
                )
            ),
            Item(("k8s:app=etcd", "k8s:io.cilium.fixed-identity=unknown")),
        ],
    )
    assert [result.number for result in results[:2]] == [128, 104]
    assert "configured: kv-store" in str(results[2])
    assert store.revision == before
    assert str(one.view.labels_of(NumericIdentity(128))) == "reserved:kv-store"
