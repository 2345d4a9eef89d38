"""A replica of the address service without its listener, on any store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random

from ipam import keys
from ipam.allocate import Request
from ipam.block import address_text, parse_address
from ipam.keys import Owner
from ipam.reclaim import EMPTY_FOR_S
from ipam.view import View
from services.ipamd import pools
from services.ipamd.allocator import Allocator
from services.ipamd.collector import Collector
from services.ipamd.cooldown import CoolDown
from services.ipamd.follow import Follower
from services.ipamd.journal import Replayer
from services.ipamd.reclaimer import Reclaimer
from services.ipamd.rows import assigned_of, owned_of
from services.ipamd.windows import Windows
from services.runtime.clock import Clock
from services.runtime.config import PoolConfig
from services.store.commit import Committer
from services.store.model import Store


@dataclass(frozen=True, slots=True)
class Replica:
    view: View
    allocator: Allocator
    reclaimer: Reclaimer
    collector: Collector
    windows: Windows
    replayer: Replayer

    async def allocate(
        self,
        name: str,
        node: str = "a",
        *,
        uid: str = "",
        wanted: str = "",
        pool: str = "default",
        retain_s: int = 0,
    ) -> str:
        """The addresses, as text, with commas between. So `wanted`."""
        addresses = tuple(parse_address(text) for text in wanted.split(",") if text)
        request = Request(node, owner(name, uid), pool, addresses, retain_s)
        given = await self.allocator.allocate(request)
        return ",".join(address_text(row.address) for row in given)

    async def release(self, name: str, node: str = "a", *, uid: str = "") -> bool:
        return await self.allocator.release(owner(name, uid), node)


def owner(name: str, uid: str = "") -> Owner:
    return Owner("shop", name, "eth0", uid)


@asynccontextmanager
async def replica(
    store: Store,
    clock: Clock,
    configured: Mapping[str, PoolConfig] | None = None,
    *,
    seed: int = 1,
    cooldown_s: int = 0,
    empty_for_s: float = EMPTY_FOR_S,
    gone_s: float = 3600.0,
) -> AsyncIterator[Replica]:
    """`configured` None: the pools are there already."""
    if configured is not None:
        await pools.ensure(store, configured)
    view = View()
    follower = Follower(store, view)
    committer = Committer(store)
    cooldown = CoolDown(store, clock, cooldown_s)
    allocator = Allocator(store, committer, view, clock, Random(seed), cooldown)
    async with committer, asyncio.TaskGroup() as tasks:
        following = tasks.create_task(follower.run())
        await follower.synced.wait()
        yield Replica(
            view,
            allocator,
            Reclaimer(store, view, clock, empty_for_s),
            Collector(store, committer, view, allocator, clock, gone_s),
            Windows(store, committer, view, allocator, clock, gone_s),
            Replayer(store, committer, view, allocator),
        )
        following.cancel()


async def check_store(store: Store) -> dict[str, str]:
    """owner -> addresses, as stored; asserts that the two indexes say the same of each other, and
    that each address lies in a claimed block of its own pool."""
    addresses = (await store.list(keys.ADDRESSES)).items
    owners = {kv.key: kv for kv in (await store.list(keys.OWNERS)).items}
    blocks = {kv.key for kv in (await store.list(keys.BLOCKS)).items}
    held: dict[str, list[str]] = {}
    by_key = {}
    for kv in addresses:
        row = assigned_of(kv)
        assert keys.block_key(row.pool, row.block) in blocks
        assert row.address in row.block
        assert keys.owner_key(row.owner) in owners
        by_key[row.pool, row.address] = row
        held.setdefault(str(row.owner), []).append(address_text(row.address))
    for key, kv in owners.items():
        namespace, name, interface = key.removeprefix(keys.OWNERS).split("/")
        for row in owned_of(Owner(namespace, name, interface), kv):
            assert by_key[row.pool, row.address] == row
    texts = [text for each in held.values() for text in each]
    assert len(set(texts)) == len(texts)
    return {who: ",".join(each) for who, each in held.items()}
