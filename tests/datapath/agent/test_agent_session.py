"""The session against a real identityd and etcd: many keys, lost leases, changed rules."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tessera_wire.identity.v1.identity_pb2_grpc import IdentityServiceStub

from datapath.agent.leases import KEYS_PER_LEASE
from datapath.agent.session import Announced, Granted, Session
from identity import keys
from services.identityd.main import identityd
from services.identityd.rules import LabelRules, set_rules
from services.runtime.clock import SystemClock
from services.runtime.config import IdentitydConfig
from services.runtime.etcd_process import EmbeddedEtcd
from services.store.model import Revision
from services.store.open import open_store
from services.wire.client import channel
from tests.fakes.etcd import HAVE_ETCD, NO_ETCD, config
from tests.fakes.identity_replica import until

pytestmark = pytest.mark.skipif(not HAVE_ETCD, reason=NO_ETCD)
DEADLINE_S = 30.0
MANY = KEYS_PER_LEASE + 500
SETS = {(f"k8s:app=app{i}",): 0 for i in range(20)}
ADDRESSES = [Announced(f"10.1.{i >> 8}.{i & 255}", 4, "shop", f"web-{i}") for i in range(MANY)]


class Node:
    """Publishes what it has whenever its session asks for it."""

    def __init__(self, stub: IdentityServiceStub, held: int) -> None:
        self.published = 0
        self.addresses = ADDRESSES[:held]
        self.session = Session(
            stub,
            node="node-a",
            node_ip="192.0.2.1",
            previous_lease=0,
            republish=self._publish,
            on_lease=self._noted,
            held=lambda: held,
            clock=SystemClock(),
            jitter=random.Random(1),
        )

    async def _publish(self) -> None:
        answers = await self.session.refer(SETS)
        assert all(isinstance(answer, Granted) for answer in answers.values())
        await self.session.announce(self.addresses)
        self.published += 1

    async def _noted(self) -> None:
        pass


@asynccontextmanager
async def connected(tmp_path: Path, held: int, ttl_s: int = 300):
    """(the node, the store, its tasks)."""
    target = f"unix://{tmp_path}/identityd.sock"
    async with (
        EmbeddedEtcd(tmp_path / "etcd") as server,
        open_store(config(server.endpoint)) as store,
        asyncio.TaskGroup() as tasks,
    ):
        settings = IdentitydConfig(
            etcd=config(server.endpoint), listen=target, metrics_listen="", session_ttl_s=ttl_s
        )
        serving = tasks.create_task(identityd(settings, SystemClock()))
        async with channel(target) as dialled:
            async with asyncio.timeout(DEADLINE_S):
                await dialled.channel_ready()
            node = Node(IdentityServiceStub(dialled), held)
            running = tasks.create_task(node.session.run())
            await until(lambda: node.session.connected, "the session", DEADLINE_S)
            yield node, store, tasks
            running.cancel()
        serving.cancel()


async def leases_of(store) -> Counter[int]:
    """How many of the node's keys hang on each lease."""
    found: Counter[int] = Counter()
    for prefix in (keys.IP_PREFIX, keys.REF_PREFIX):
        found.update(kv.lease for kv in (await store.list(prefix)).items)
    return found


async def test_many_addresses_are_spread_over_leases_and_all_of_them_are_kept(tmp_path):
    async with connected(tmp_path, MANY) as (node, store, _):
        spread = await leases_of(store)
        assert sum(spread.values()) == MANY + len(SETS)
        assert sorted(spread.values()) == [MANY + len(SETS) - KEYS_PER_LEASE, KEYS_PER_LEASE]
        assert node.session.lease in spread
        assert await store.get(keys.node_key("default", "node-a")) is not None


async def test_when_one_of_the_leases_is_lost_everything_is_published_again(tmp_path):
    async with connected(tmp_path, MANY, ttl_s=5) as (node, store, _):
        first = node.session.lease
        [other] = set(await leases_of(store)) - {first}
        await store.revoke(other)
        assert sum((await leases_of(store)).values()) < MANY
        await until(lambda: node.published == 2, "published again", DEADLINE_S)
        spread = await leases_of(store)
        assert sum(spread.values()) == MANY + len(SETS)
        assert other not in spread


async def test_the_session_tells_of_label_rules_once_for_each_version(tmp_path):
    async with connected(tmp_path, 1) as (node, store, tasks):
        told: list[int] = []
        following = tasks.create_task(node.session.follow_rules(lambda: told.append(1)))
        await until(lambda: len(told) == 1, "the rules in force", DEADLINE_S)
        revision = await set_rules(store, LabelRules(namespace_quota=9), Revision(0))
        await set_rules(store, LabelRules(label_filter=("!uid",)), revision)
        await until(lambda: len(told) == 2, "the new rules", DEADLINE_S)
        following.cancel()
