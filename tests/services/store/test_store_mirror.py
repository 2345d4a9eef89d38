from __future__ import annotations

import asyncio

import pytest

from services.runtime.errors import Unusable
from services.store.mirror import EventQueue, Mirror
from services.store.model import Changed, KeyValue, Removed, Revision, Synced


def kv(key: str, mod: int) -> KeyValue:
    return KeyValue(key, b"", Revision(1), Revision(mod), 1)


def changed(key: str, mod: int) -> Changed:
    return Changed(kv(key, mod))


def removed(key: str, revision: int) -> Removed:
    return Removed(key, Revision(revision))


def test_the_difference_is_what_brings_the_consumer_up_to_date() -> None:
    mirror = Mirror()
    mirror.apply([changed("same", 2), changed("newer", 3), changed("gone", 4), removed("early", 5)])
    found = [kv("same", 2), kv("newer", 9), kv("added", 8)]
    assert mirror.difference(found, Revision(10)) == (
        removed("gone", 10),
        changed("newer", 9),
        changed("added", 8),
    )
    assert mirror.difference(found, Revision(11)) == ()


def test_revisions_of_another_store_say_nothing() -> None:
    mirror = Mirror()
    mirror.apply([changed("a", 2)])
    found = [kv("a", 2)]
    assert mirror.difference(found, Revision(3), same_store=False) == (changed("a", 2),)


async def test_the_queue_keeps_the_last_event_per_key_in_order_of_revisions() -> None:
    queue = EventQueue(limit=10)
    await queue.put([changed("a", 1), changed("b", 1)])
    await queue.put([changed("a", 2), removed("c", 3)])
    assert await queue.take() == (changed("b", 1), changed("a", 2), removed("c", 3))


async def test_a_full_queue_makes_the_reader_wait() -> None:
    queue = EventQueue(limit=2)
    order: list[str] = []

    async def reader() -> None:
        await queue.put([changed("a", 1), changed("b", 1)])
        order.append("put")

    async with asyncio.TaskGroup() as group:
        group.create_task(reader())
        for _ in range(5):
            await asyncio.sleep(0)
        order.append("taking")
        await queue.take()
    assert order == ["taking", "put"]


async def test_nothing_overtakes_the_end_of_the_listing() -> None:
    queue = EventQueue(limit=10)

    async def reader() -> None:
        await queue.put([changed("a", 1)])
        await queue.synced(Revision(1))
        await queue.put([changed("a", 2)])

    async with asyncio.TaskGroup() as group:
        group.create_task(reader())
        for _ in range(5):
            await asyncio.sleep(0)
        assert await queue.take() == (changed("a", 1), Synced(Revision(1)))
        assert await queue.take() == (changed("a", 2),)


async def test_a_failure_comes_after_what_was_read_before_it() -> None:
    queue = EventQueue(limit=10)
    await queue.put([changed("a", 1)])
    queue.fail(Unusable("no"))
    assert await queue.take() == (changed("a", 1),)
    for _ in range(2):
        with pytest.raises(Unusable):
            await queue.take()


async def test_a_closed_queue_is_empty_at_once() -> None:
    queue = EventQueue(limit=10)
    queue.close()
    assert await queue.take() == ()
    assert await queue.take() == ()
