"""Configured pools against what is stored."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest

from ipam import keys
from ipam.block import Family
from services.ipamd import pools
from services.ipamd.rows import pool_of
from services.runtime.config import PoolConfig
from services.runtime.errors import Conflict, Invalid, NotFound
from services.store.memory import MemoryStore
from tests.fakes.address_service import check_store, replica
from tests.fakes.clock import FakeClock


def pool(*cidrs: str, size: int = 26, reserved: tuple[str, ...] = ()) -> dict[str, PoolConfig]:
    return {"default": PoolConfig(cidrs=cidrs, block_size=size, reserved=reserved)}


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    async with MemoryStore(FakeClock()) as memory:
        yield memory


async def stored(store: MemoryStore) -> dict[str, tuple[str, ...]]:
    listing = await store.list(keys.POOLS)
    return {p.name: tuple(map(str, p.cidrs)) for p in map(pool_of, listing.items)}


async def test_a_configured_pool_is_created_once(store) -> None:
    await pools.ensure(store, pool("10.0.0.0/16"))
    revision = store.revision
    await pools.ensure(store, pool("10.0.0.0/16"))
    assert store.revision == revision
    assert await stored(store) == {"default": ("10.0.0.0/16",)}


async def test_a_pool_that_only_the_store_has_is_kept(store) -> None:
    await pools.ensure(store, pool("10.0.0.0/16"))
    await pools.ensure(store, {"blue": PoolConfig(cidrs=("10.9.0.0/16",))})
    assert set(await stored(store)) == {"default", "blue"}


async def test_pools_that_overlap_are_refused(store) -> None:
    await pools.ensure(store, pool("10.0.0.0/16"))
    with pytest.raises(Invalid, match=r"pool blue: 10\.0\.8\.0/24 overlaps 10\.0\.0\.0/16"):
        await pools.ensure(store, {"blue": PoolConfig(cidrs=("10.0.8.0/24",))})


async def test_a_definition_that_is_none_names_its_table(store) -> None:
    with pytest.raises(Invalid, match=r"\[ipamd\.pools\.default\]: pool default: a block of /26"):
        await pools.ensure(store, pool("10.0.0.0/28"))


async def test_a_wider_pool_serves_at_once(store) -> None:
    clock = FakeClock()
    async with replica(store, clock, pool("10.0.0.0/30", size=30)) as one:
        await one.allocate("a")
        await one.allocate("b")
        await pools.ensure(store, pool("10.0.0.0/30", "10.0.1.0/30", size=30))
        while one.view.pool("default").capacity(Family.V4) == 2:
            await store.get("anything")
        assert await one.allocate("c") == "10.0.1.1"


async def test_a_range_with_addresses_in_use_cannot_be_dropped(store) -> None:
    wide = pool("10.0.0.0/24", "10.0.1.0/24")
    async with replica(store, FakeClock(), wide) as one:
        await one.allocate("db", wanted="10.0.1.9")
        with pytest.raises(Invalid) as caught:
            await pools.ensure(store, pool("10.0.0.0/24"))
        assert str(caught.value) == (
            "pool default: the new definition loses 1 addresses in use (10.0.1.9 of shop/db eth0);"
            " release them first, or put the range back"
        )
        assert await stored(store) == {"default": ("10.0.0.0/24", "10.0.1.0/24")}


@pytest.mark.parametrize(
    "narrow", [pool("10.0.0.0/25"), pool("10.0.0.0/24", reserved=("10.0.0.200/32",))]
)
async def test_neither_by_narrowing_nor_by_reserving(store, narrow) -> None:
    async with replica(store, FakeClock(), pool("10.0.0.0/24")) as one:
        await one.allocate("db", wanted="10.0.0.200")
        with pytest.raises(Invalid, match="loses 1 addresses"):
            await pools.ensure(store, narrow)


async def test_dropping_an_unused_range_takes_its_blocks_along(store) -> None:
    async with replica(store, FakeClock(), pool("10.0.0.0/24", "10.0.1.0/24")) as one:
        await one.allocate("db", wanted="10.0.1.9")
        await one.allocate("web", wanted="10.0.0.9")
        await one.release("db")
        await pools.ensure(store, pool("10.0.0.0/24"))
        blocks = (await store.list(keys.BLOCKS)).items
        assert [str(keys.parse_block_key(kv.key)[1]) for kv in blocks] == ["10.0.0.0/26"]
        # The view may be late and still know the dropped block; the transaction does not.
        with pytest.raises(Invalid, match="outside pool"):
            await one.allocate("db", wanted="10.0.1.10")
    assert await check_store(store) == {"shop/web eth0": "10.0.0.9"}


async def test_the_block_size_stays_while_blocks_are_held(store) -> None:
    async with replica(store, FakeClock(), pool("10.0.0.0/24")) as one:
        await one.allocate("web")
        with pytest.raises(
            Invalid, match="block sizes cannot change from /26 and /122 to /27 and /122 while nodes"
        ):
            await pools.ensure(store, pool("10.0.0.0/24", size=27))


async def test_the_block_size_changes_when_no_block_is_held(store) -> None:
    await pools.ensure(store, pool("10.0.0.0/24"))
    await pools.ensure(store, pool("10.0.0.0/24", size=27))
    assert [pool_of(kv).block_size for kv in (await store.list(keys.POOLS)).items] == [27]


async def test_a_stored_pool_that_cannot_be_read_is_named(store) -> None:
    await store.put(keys.pool_key("default"), b"{}")
    with pytest.raises(Invalid, match="edited by hand"):
        await pools.ensure(store, pool("10.0.0.0/24"))


# ------------------------------------------------------------------ what an operator changes


async def put(store: MemoryStore, revision: int | None = None, *cidrs: str, **fields):
    record = keys.PoolRecord(cidrs=cidrs, **fields)
    return await pools.put(store, "blue", record, revision)


async def test_a_pool_is_changed_from_the_revision_that_was_seen(store) -> None:
    _, action, first = await put(store, 0, "10.0.0.0/24")
    assert action == "created"
    with pytest.raises(Conflict, match="pool blue exists already"):
        await put(store, 0, "10.0.0.0/23")
    _, action, second = await put(store, first, "10.0.0.0/23")
    assert (action, second > first) == ("changed", True)
    with pytest.raises(Conflict, match=r"was changed meanwhile \(revision"):
        await put(store, first, "10.0.0.0/22")
    assert (await put(store, second, "10.0.0.0/23"))[1] == "unchanged"
    await pools.delete(store, "blue", second)
    with pytest.raises(NotFound, match="no pool 'blue' to change"):
        await put(store, second, "10.0.0.0/23")


async def test_a_dry_run_writes_nothing(store) -> None:
    record = keys.PoolRecord(cidrs=("10.0.0.0/24",))
    assert (await pools.put(store, "blue", record, None, dry_run=True))[1] == "created"
    assert await stored(store) == {}


async def test_the_network_of_a_node_is_no_pool(store) -> None:
    record = keys.NodeRecord("disk", 0.0, ("192.168.0.0/24", "fd99::/64"))
    await store.put(keys.node_key("n1"), msgspec.json.encode(record))
    with pytest.raises(Invalid, match=r"192\.168\.0\.0/16 overlaps 192\.168\.0\.0/24 of node n1"):
        await put(store, None, "192.168.0.0/16")
    with pytest.raises(Invalid, match="of node n1"):
        await put(store, None, "fd99::/48")


async def test_the_range_of_another_cluster_is_no_pool(store) -> None:
    node = {
        "Name": "kind-worker",
        "Cluster": "east",
        "IPv4AllocCIDR": {"IP": "10.8.1.0", "Mask": "////AA=="},
        "IPv6AllocCIDR": None,
    }
    key = "cilium/cache/nodes/v1/east/kind-worker"
    await store.put(key, msgspec.json.encode(node))
    await store.put("cilium/cache/nodes/v1/west/odd", b"{not json")
    with pytest.raises(Invalid, match=r"overlaps 10\.8\.1\.0/24 of cluster east"):
        await put(store, None, "10.8.0.0/16")
    await put(store, None, "10.9.0.0/16")


async def test_a_pool_in_use_is_not_deleted_and_names_who_uses_it(store) -> None:
    async with replica(store, FakeClock(), pool("10.0.0.0/24")) as one:
        await one.allocate("db")
        with pytest.raises(Invalid, match=r"deleting it loses 1 addresses .* of shop/db eth0"):
            await pools.delete(store, "default", None)
        await one.release("db")
        assert await pools.delete(store, "default", None) == 1
    assert (await store.list(keys.BLOCKS)).items == ()
    with pytest.raises(NotFound, match="no pool 'default'; known: none"):
        await pools.delete(store, "default", None)


async def test_disabling_keeps_what_is_in_use_and_gives_nothing_new(store) -> None:
    async with replica(store, FakeClock(), pool("10.0.0.0/30", "10.0.1.0/30", size=30)) as one:
        first = await one.allocate("a")
        draining = keys.PoolRecord(
            cidrs=("10.0.0.0/30", "10.0.1.0/30"), block_size=30, disabled=("10.0.0.0/30",)
        )
        pool_now, _, revision = await pools.put(store, "default", draining, None)
        one.view.put_pool(pool_now, revision)
        assert await one.allocate("b") in ("10.0.1.1", "10.0.1.2")
        assert await one.allocate("a") == first
