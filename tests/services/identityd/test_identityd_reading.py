"""What the view tells those who ask: usage, addresses, and the feed of changes."""

import asyncio

import pytest

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.identityd.feed import HISTORY, Change, ChangeKind, Feed
from services.identityd.published import AddressValue
from services.identityd.references import release
from services.identityd.usage import KeyUsage, Usage
from services.runtime.clock import SystemClock
from services.store.memory import MemoryStore
from services.store.model import Revision
from tests.fakes.identity_replica import replica, until


@pytest.fixture
async def store():
    async with MemoryStore(SystemClock()) as memory:
        yield memory


@pytest.fixture
async def one(store):
    async with replica(store, SystemClock()) as made:
        yield made


def sets(namespace, count):
    return [
        Labels.parse((f"k8s:io.kubernetes.pod.namespace={namespace}", "k8s:app=a", f"k8s:uid={i}"))
        for i in range(count)
    ]


def test_usage_names_the_key_that_differs_with_every_instance():
    usage = Usage()
    for labels in (*sets("shop", 5), *sets("bank", 2)):
        usage.add(labels)
    assert usage.namespaces == {"shop": 5, "bank": 2}
    assert usage.of_keys("shop")[0] == KeyUsage("uid", 5, 5)
    assert usage.of_keys()[0] == KeyUsage("uid", 7, 5)
    assert usage.values_of("app", 10) == [("a", 7)]
    assert len(usage.values_in("bank")["uid"]) == 2


def test_usage_forgets_what_is_removed():
    usage = Usage()
    for labels in sets("shop", 5):
        usage.add(labels)
    for labels in sets("shop", 5):
        usage.remove(labels)
    assert (usage.namespaces, usage.of_keys()) == ({}, [])


async def test_addresses_are_found_by_identity_and_by_endpoint_and_name_their_node(store, one):
    lease = await one.open("node-a")
    [number] = await one.allocate(lease, "k8s:app=web")
    values = [
        AddressValue(f"10.0.0.{i}", "192.0.2.1", number, namespace="shop", name=f"web-{i}")
        for i in (2, 1)
    ]
    await one.announcer.announce("node-a", lease, values)
    await until(lambda: len(one.view.announced) == 2, "both addresses")
    announced = one.view.announced
    assert [a.ip for a in announced.of_identity(number)] == ["10.0.0.1", "10.0.0.2"]
    [found] = announced.of_endpoint("shop", "web-2")
    assert (found.ip, found.identity, found.node) == ("10.0.0.2", number, "node-a")
    await one.announcer.withdraw("192.0.2.1", ["10.0.0.2"])
    await until(lambda: announced.at("10.0.0.2") is None, "the withdrawal")
    assert announced.of_endpoint("shop", "web-2") == []


async def test_the_feed_tells_the_life_of_an_identity_from_any_revision_on(store, one):
    lease = await one.open()
    start = one.view.revision
    [number] = await one.allocate(lease, "k8s:app=web")
    await release(store, "node-a", [NumericIdentity(number)])
    kinds = []
    async with asyncio.timeout(5):
        async for batch in one.view.feed.follow(start):
            kinds += [(change.kind, change.number, change.node) for change in batch]
            if len(kinds) == 3:
                break
    assert kinds == [
        (ChangeKind.CREATED, number, ""),
        (ChangeKind.REFERENCED, number, "node-a"),
        (ChangeKind.RELEASED, number, "node-a"),
    ]
    last = one.view.feed.since(start)[-1].revision
    assert one.view.feed.since(last) == []
    assert one.view.revision >= last


async def test_a_follower_that_was_away_too_long_is_told_so():
    feed = Feed()
    feed.begin(Revision(10))
    assert feed.since(Revision(9)) is None
    for i in range(HISTORY + 1):
        feed.add(Change(Revision(11 + i), ChangeKind.CREATED, NumericIdentity(256), Labels.EMPTY))
    assert feed.since(Revision(10)) is None
    assert len(feed.since(Revision(11))) == HISTORY
    assert [batch async for batch in feed.follow(Revision(10))] == []
