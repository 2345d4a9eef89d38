"""A replica of the address service without its listener, on any store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from random import Random

from ipam import keys
from ipam.allocate import Request
from ipam.keys import Owner
from ipam.reclaim import EMPTY_FOR_S
from ipam.view import View
from services.ipamd import pools
from services.ipamd.allocator import Allocator
from services.ipamd.cooldown import CoolDown
from services.ipamd.follow import Follower
from services.ipamd.reclaimer import Reclaimer
from services.ipamd.rows import assigned_of
from services.runtime.clock import Clock
from services.runtime.config import PoolConfig
from services.store.model import Store


@dataclass(frozen=True, slots=True)
class Replica:
    view: View
    allocator: Allocator
    reclaimer: Reclaimer

    async def allocate(
        self, name: str, node: str = "a", *, uid: str = "", wanted: str = "", pool: str = "default"
    ) -> str:
        """The address, as text."""
        address = int(IPv4Address(wanted)) if wanted else None
        request = Request(node, owner(name, uid), pool, address)
        return str(IPv4Address((await self.allocator.allocate(request)).address))

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
    cooldown_s: float = 0,
    empty_for_s: float = EMPTY_FOR_S,
) -> AsyncIterator[Replica]:
    """`configured` None: the pools are there already."""
    if configured is not None:
        await pools.ensure(store, configured)
    view = View()
    follower = Follower(store, view)
    allocator = Allocator(store, view, clock, Random(seed), CoolDown(store, clock, cooldown_s))
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(follower.run())
        await follower.synced.wait()
        yield Replica(view, allocator, Reclaimer(store, view, clock, empty_for_s))
        following.cancel()


async def check_store(store: Store) -> dict[str, str]:
    """owner -> address, as stored; asserts that the two indexes say the same of each other, and
    that each address lies in a claimed block."""
    addresses = (await store.list(keys.ADDRESSES)).items
    owners = {kv.key: kv for kv in (await store.list(keys.OWNERS)).items}
    blocks = {kv.key for kv in (await store.list(keys.BLOCKS)).items}
    held: dict[str, str] = {}
    for kv in addresses:
        row = assigned_of(kv)
        own = owners.pop(keys.owner_key(row.owner))
        assert own.mod_revision == kv.mod_revision
        assert keys.block_key(row.pool, row.block) in blocks
        assert row.address in row.block
        held[str(row.owner)] = str(IPv4Address(row.address))
    assert owners == {}
    assert len(set(held.values())) == len(held)
    return held
