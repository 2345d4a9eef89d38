"""The judge of the soak can find fault."""

from __future__ import annotations

import pytest

from ipam import keys
from services.runtime.config import PoolConfig
from services.store.memory import MemoryStore
from tests.fakes import address_checker
from tests.fakes.address_service import replica
from tests.fakes.clock import FakeClock

POOL = {"default": PoolConfig(cidrs=("10.0.0.0/24",))}


def line(at: float, what: str, owner: str, ip: str = "10.0.0.1", number: int = 1):
    return (at, what, owner, number, [ip])


def test_one_after_the_other_is_fine() -> None:
    first = [line(1, "given", "a"), line(2, "released", "a")]
    assert address_checker.twice({"x": first, "y": [line(3, "given", "b")]}, {}) == []


@pytest.mark.parametrize(
    "other",
    [
        [line(1.5, "given", "b")],
        [line(0.5, "given", "b"), line(1.2, "released", "b")],
        [line(1.5, "given", "b"), line(1.6, "released", "b")],
    ],
)
def test_two_at_one_time_are_found(other) -> None:
    first = [line(1, "given", "a"), line(2, "released", "a")]
    assert len(address_checker.twice({"x": first, "y": other}, {})) == 1


def test_who_never_released_still_has_it_unless_his_node_is_dead() -> None:
    ledgers = {"x": [line(1, "given", "a")], "y": [line(5, "given", "b")]}
    assert len(address_checker.twice(ledgers, {})) == 1
    assert address_checker.twice(ledgers, {"x": 4}) == []


async def test_faults_of_the_store_are_found() -> None:
    clock = FakeClock()
    async with MemoryStore(clock) as store, replica(store, clock, POOL) as one:
        first, second = await one.allocate("a"), await one.allocate("b")
        left = {"shop/a eth0": {first}, "shop/b eth0": {second}}
        assert await address_checker.stored(store, left) == []
        del left["shop/b eth0"]
        assert "leaked" in (await address_checker.stored(store, left))[0]
        left |= {"shop/b eth0": {"10.0.0.99"}}
        assert "the store says" in (await address_checker.stored(store, left))[0]
        left["shop/b eth0"] = {second}
        left["shop/c eth0"] = {"10.0.0.7"}
        assert "knows nothing" in (await address_checker.stored(store, left))[0]
        del left["shop/c eth0"]
        await store.delete(next(kv.key for kv in (await store.list(keys.ADDRESSES)).items))
        assert any("not its own" in words for words in await address_checker.stored(store, left))
        for kv in (await store.list(keys.BLOCKS)).items:
            await store.delete(kv.key)
        assert any("nobody has" in words for words in await address_checker.stored(store, left))
