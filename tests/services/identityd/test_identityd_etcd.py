"""The same promises on a real etcd, and the process as nodes meet it: over gRPC."""

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tessera_wire.identity.v1 import identity_pb2 as pb
from tessera_wire.identity.v1.identity_pb2_grpc import IdentityServiceStub

from identity import keys
from identity.numbers import NumericIdentity
from services.identityd.allocator import Item
from services.identityd.main import identityd
from services.identityd.references import release
from services.identityd.txns import collect
from services.runtime.clock import SystemClock
from services.runtime.config import IdentitydConfig
from services.runtime.errors import Invalid, NotFound
from services.runtime.etcd_process import EmbeddedEtcd
from services.store.open import open_store
from services.wire.client import call, channel
from tests.fakes.etcd import HAVE_ETCD, NO_ETCD, config
from tests.fakes.identity_replica import assert_consistent, replica, until

pytestmark = pytest.mark.skipif(not HAVE_ETCD, reason=NO_ETCD)
DEADLINE_S = 10.0


@pytest.fixture
async def etcd(tmp_path: Path):
    async with EmbeddedEtcd(tmp_path / "data") as server:
        yield server


@pytest.fixture
async def store(etcd):
    async with open_store(config(etcd.endpoint)) as opened:
        yield opened


async def test_two_replicas_on_one_etcd_give_each_set_one_number(etcd):
    clock = SystemClock()
    # The numbers are few, so that the replicas also race for them.
    numbers = range(256, 256 + 700)
    async with (
        open_store(config(etcd.endpoint)) as store,
        open_store(config(etcd.endpoint)) as other_store,
        replica(store, clock, seed=1, numbers=numbers) as one,
        replica(other_store, clock, seed=1, numbers=numbers) as other,
    ):
        leases = {n: await one.open(n) for n in ("node-a", "node-b", "node-c", "node-d")}
        texts = [f"k8s:app=app{i}" for i in range(600)]
        got = []

        async def allocate(member, node, order):
            numbers = await member.allocate(leases[node], *order, node=node)
            got.append(dict(zip(order, numbers, strict=True)))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(allocate(one, "node-a", texts))
            tasks.create_task(allocate(other, "node-b", texts))
            tasks.create_task(allocate(one, "node-c", texts[::-1]))
            tasks.create_task(allocate(other, "node-d", texts[::-1]))
        assert all(each == got[0] for each in got)
        assert len(await assert_consistent(store)) == 600
        number = NumericIdentity(got[0][texts[0]])
        await until(lambda: len(one.view.nodes_of(number)) == 4, "all references")


async def test_a_burst_of_ten_thousand_sets(store):
    async with replica(store, SystemClock()) as one:
        lease = await one.open()
        numbers = await one.allocate(lease, *(f"k8s:app=app{i}" for i in range(10_000)))
        assert len(set(numbers)) == 10_000
        assert len(await assert_consistent(store)) == 10_000
        await until(lambda: one.view.in_use == 10_000, "the view has seen all")


async def test_references_and_collections_exclude_each_other_on_etcd(store):
    async with replica(store, SystemClock()) as one:
        lease = await one.open()
        kept, gone = map(NumericIdentity, await one.allocate(lease, "k8s:app=a", "k8s:app=b"))
        await release(store, "node-a", [gone])
        await until(lambda: gone in one.view.idle_since(), "the released number")
        items = [one.view.collectable(number) for number in (kept, gone)]
        done = [(await store.txn(collect(item, lease))).succeeded for item in items]
        assert done == [False, True]
        assert await store.get(keys.tomb_key(gone)) is not None
        # The set is given a number anew, and the one in quarantine is not it.
        [again] = await one.allocate(lease, "k8s:app=b")
        assert again != gone


async def test_a_dead_lease_fails_its_own_items_alone_on_etcd(store):
    async with replica(store, SystemClock()) as one:
        dead, alive = await one.open("node-a"), await one.open("node-b")
        await store.revoke(dead)
        got = {}

        async def allocate(node, lease):
            try:
                got[node] = await one.allocate(lease, f"k8s:app={node}", node=node)
            except NotFound as error:
                got[node] = str(error)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(allocate("node-a", dead))
            tasks.create_task(allocate("node-b", alive))
        assert "open a new session" in got["node-a"]
        assert len(got["node-b"]) == 1


async def test_a_number_returns_from_quarantine_to_its_own_set_on_etcd(store):
    async with replica(store, SystemClock()) as one:
        lease = await one.open()
        [number] = map(NumericIdentity, await one.allocate(lease, "k8s:app=a"))
        await release(store, "node-a", [number])
        await until(lambda: number in one.view.idle_since(), "the released number")
        assert (await store.txn(collect(one.view.collectable(number), lease))).succeeded
        await until(lambda: one.view.find(number), "the tombstone")
        [result] = await one.allocator.allocate("node-a", lease, [Item(("k8s:app=a",), number)])
        assert (result.number, result.remapped) == (number, False)
        assert await store.get(keys.tomb_key(number)) is None


# ------------------------------------------------------------------ the process


@asynccontextmanager
async def served(etcd, tmp_path):
    target = f"unix://{tmp_path}/identityd.sock"
    settings = IdentitydConfig(etcd=config(etcd.endpoint), listen=target, metrics_listen="")
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(identityd(settings, SystemClock()))
        async with channel(target) as dialled:
            async with asyncio.timeout(DEADLINE_S):
                await dialled.channel_ready()
            yield IdentityServiceStub(dialled)
        serving.cancel()


async def ask(method, request):
    return await call(method, request, deadline_s=DEADLINE_S)


def items(*texts: str) -> list[pb.AllocateItem]:
    return [pb.AllocateItem(labels=pb.LabelSet(labels=[text])) for text in texts]


async def test_a_node_meets_the_service_over_grpc(etcd, tmp_path):
    async with served(etcd, tmp_path) as identity:
        session = await ask(
            identity.OpenSession, pb.OpenSessionRequest(node="node-a", internal_ip="192.0.2.1")
        )
        assert (session.ttl_s, session.resumed, session.cluster) == (300, False, "default")
        answer = await ask(
            identity.Allocate,
            pb.AllocateRequest(
                node="node-a",
                lease=session.lease,
                items=items("k8s:app=web", "k8s:", "reserved:host"),
            ),
        )
        web, refused, host = answer.results
        assert list(web.labels.labels) == [
            "k8s:app=web",
            "k8s:io.cilium.k8s.policy.cluster=default",
        ]
        assert (refused.identity, refused.problem.kind) == (0, "invalid")
        assert "the key is empty" in refused.problem.message
        assert host.identity == 1

        announcement = pb.Announcement(
            ip="10.244.0.5",
            identity=web.identity,
            host_ip="192.0.2.1",
            namespace="shop",
            name="web-0",
        )
        await ask(
            identity.Announce,
            pb.AnnounceRequest(node="node-a", lease=session.lease, items=[announcement]),
        )
        await ask(
            identity.Withdraw,
            pb.WithdrawRequest(node="node-a", host_ip="192.0.2.1", ips=["10.244.0.5"]),
        )
        left = await ask(identity.KeepAlive, pb.KeepAliveRequest(lease=session.lease))
        assert 0 < left.ttl_s <= 300
        await ask(identity.Release, pb.ReleaseRequest(node="node-a", identities=[web.identity]))
        await ask(identity.CloseSession, pb.CloseSessionRequest(node="node-a", lease=session.lease))
        gone = await ask(identity.KeepAlive, pb.KeepAliveRequest(lease=session.lease))
        assert gone.ttl_s == 0
        with pytest.raises(NotFound, match="open a new session"):
            await ask(
                identity.Allocate,
                pb.AllocateRequest(node="node-a", lease=session.lease, items=items("k8s:app=x")),
            )


async def test_a_cluster_id_beyond_the_format_is_refused_at_the_start():
    with pytest.raises(Invalid, match=r"identityd\.cluster_id: cluster id 300"):
        await identityd(IdentitydConfig(cluster_id=300), SystemClock())
