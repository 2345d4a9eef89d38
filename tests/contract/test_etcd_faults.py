"""The etcd store against a real etcd that stops, forgets, dies and comes back."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import grpc
import pytest
from tessera_wire.etcd import etcd_pb2 as pb
from tessera_wire.etcd import etcd_pb2_grpc as rpc

from services.runtime.errors import Exhausted, Invalid, Retry, Unusable
from services.runtime.etcd_process import EmbeddedEtcd
from services.store.etcd import EtcdStore
from services.store.model import LeaseId, Put, Removed, Synced
from services.store.txn import bulk_txn
from tests.fakes.etcd import DEADLINE_S, HAVE_ETCD, NO_ETCD, Follower, config, keys_of
from tests.fakes.proxy import Proxy

pytestmark = pytest.mark.skipif(not HAVE_ETCD, reason=NO_ETCD)

# Nothing listens on the discard port of the loopback.
DEAD = "127.0.0.1:9"


class InOrder(random.Random):
    """Leaves the endpoints as they were given."""

    def shuffle(self, x: object) -> None:
        pass


@pytest.fixture
async def proxy(own_etcd: EmbeddedEtcd) -> AsyncIterator[Proxy]:
    async with Proxy(own_etcd.endpoint) as proxy:
        yield proxy


async def compact(server: EmbeddedEtcd, revision: int) -> None:
    async with grpc.aio.insecure_channel(server.endpoint) as channel:
        await rpc.KVStub(channel).Compact(pb.CompactionRequest(revision=revision, physical=True))


async def freeze(server: EmbeddedEtcd) -> None:
    """Returns when every thread stands still; until then a call may still be answered."""
    server.send_signal(signal.SIGSTOP)
    async with asyncio.timeout(DEADLINE_S):
        while not _stopped(server):  # noqa: ASYNC110 - the kernel sends no event
            await asyncio.sleep(0)


def _stopped(server: EmbeddedEtcd) -> bool:
    threads = Path(f"/proc/{server.pid}/task").glob("*/stat")
    return all(thread.read_text().rpartition(")")[2].split()[0] == "T" for thread in threads)


async def keep_trying(call: Callable[[], Awaitable[object]]) -> None:
    """Until the store answers again."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await call()
            except Retry:
                continue
            return


async def _fill(store: EtcdStore) -> None:
    for n in range(100):
        await store.put(f"p/{n}", b"x" * 500_000)


# -- unreachable


async def test_nobody_listening_is_a_retry_that_names_the_endpoint() -> None:
    async with EtcdStore(config(DEAD, request_timeout_s=0.5)) as store:
        with pytest.raises(Retry, match=r"etcd at 127\.0\.0\.1:9 cannot be reached; is it running"):
            await store.get("a")
        with pytest.raises(Retry, match="cannot be reached"):
            await store.put("a", b"")
        with pytest.raises(Retry):
            await store.keep_alive(LeaseId(7))


async def test_when_no_endpoint_answers_all_are_named() -> None:
    async with EtcdStore(config(DEAD, "127.0.0.1:11", request_timeout_s=0.5)) as store:
        with pytest.raises(Retry, match=r"no etcd of .*127\.0\.0\.1.* answers") as caught:
            await store.get("a")
        assert DEAD in str(caught.value)
        assert "127.0.0.1:11" in str(caught.value)


async def test_a_frozen_etcd_is_a_retry_and_works_again_after(own_etcd: EmbeddedEtcd) -> None:
    async with EtcdStore(config(own_etcd.endpoint, request_timeout_s=1.0)) as store:
        lease = await store.grant(60)
        assert await store.keep_alive(lease) == 60
        await freeze(own_etcd)
        for call in (store.get("a"), store.put("a", b"1"), store.keep_alive(lease)):
            with pytest.raises(Retry, match=r"did not (answer|renew)"):
                await call
        own_etcd.send_signal(signal.SIGCONT)
        await keep_trying(lambda: store.get("a"))
        await keep_trying(lambda: store.keep_alive(lease))


async def test_a_watch_waits_out_a_frozen_etcd(own_etcd: EmbeddedEtcd) -> None:
    async with EtcdStore(config(own_etcd.endpoint, request_timeout_s=1.0)) as store:
        seen = Follower(store.watch("p/"))
        await seen.until_synced()
        await freeze(own_etcd)
        with pytest.raises(Retry):
            await store.get("a")
        own_etcd.send_signal(signal.SIGCONT)
        await keep_trying(lambda: store.put("p/a", b""))
        await seen.until_values({"p/a": b""})


# -- restarts and gaps


async def test_a_killed_and_restarted_etcd_loses_no_event(own_etcd: EmbeddedEtcd) -> None:
    async with EtcdStore(config(own_etcd.endpoint)) as store:
        seen = Follower(store.watch("p/"))
        await seen.until_synced()
        expected = {}
        for n in range(30):
            if n % 10 == 5:
                own_etcd.send_signal(signal.SIGKILL)
                await own_etcd.stop()
                await own_etcd.start()
            expected[f"p/{n}"] = b"v"
            await keep_trying(partial(store.put, f"p/{n}", b"v"))
        await seen.until_values(expected)
        assert keys_of(seen.events) == list(expected)
        assert [isinstance(e, Synced) for e in seen.events].count(True) == 1


async def test_a_broken_stream_resumes_where_it_stopped(
    own_etcd: EmbeddedEtcd, proxy: Proxy
) -> None:
    async with (
        EtcdStore(config(own_etcd.endpoint)) as writer,
        EtcdStore(config(proxy.endpoint)) as reader,
    ):
        seen = Follower(reader.watch("p/"))
        await seen.until_synced()
        for cuts in range(3):
            await proxy.cut()
            await writer.put(f"p/{cuts}", b"while away")
            await proxy.restore()
            await seen.until_values({f"p/{n}": b"while away" for n in range(cuts + 1)})
        assert keys_of(seen.events) == ["p/0", "p/1", "p/2"]


async def test_compaction_during_a_gap_ends_in_the_difference(
    own_etcd: EmbeddedEtcd, proxy: Proxy
) -> None:
    async with (
        EtcdStore(config(own_etcd.endpoint)) as writer,
        EtcdStore(config(proxy.endpoint), page_keys=2) as reader,
    ):
        for name in ("kept", "changed", "removed", "remade"):
            await writer.put(f"p/{name}", b"old")
        seen = Follower(reader.watch("p/"))
        await seen.until_synced()
        known = len(seen.events)
        await proxy.cut()
        await writer.put("p/changed", b"new")
        await writer.delete("p/removed")
        await writer.delete("p/remade")
        await writer.put("p/remade", b"new")
        await compact(own_etcd, await writer.put("p/added", b"new"))
        await writer.put("q", b"")
        await proxy.restore()
        expected = {"p/kept": b"old", "p/changed": b"new", "p/remade": b"new", "p/added": b"new"}
        await seen.until_values(expected)
        told = seen.events[known:]
        assert sorted(keys_of(told)) == ["p/added", "p/changed", "p/remade", "p/removed"]
        assert [e.key for e in told if isinstance(e, Removed)] == ["p/removed"]
        # And it follows on from there.
        await writer.delete("p/kept")
        await seen.until(lambda s: "p/kept" not in s.values)


async def test_compaction_between_pages_lists_anew(own_etcd: EmbeddedEtcd) -> None:
    async with EtcdStore(config(own_etcd.endpoint), page_keys=1) as store:
        await store.txn(bulk_txn((), [Put(f"p/{n:03}", b"") for n in range(300)]))
        async with asyncio.TaskGroup() as group:
            listing = group.create_task(store.list("p/"))
            for _ in range(3):
                await compact(own_etcd, await store.put("q", b""))
        assert len(listing.result().items) == 300


async def test_another_etcd_at_the_same_address_is_listed_anew(
    own_etcd: EmbeddedEtcd, tmp_path: Path
) -> None:
    async with EtcdStore(config(own_etcd.endpoint)) as store:
        for n in range(5):
            await store.put(f"p/{n}", b"first")
        seen = Follower(store.watch("p/"))
        await seen.until_synced()
        port = int(own_etcd.endpoint.rpartition(":")[2])
        await own_etcd.stop()
        async with EmbeddedEtcd(tmp_path / "other", client_port=port):
            await keep_trying(lambda: store.put("p/1", b"second"))
            await seen.until_values({"p/1": b"second"})
            assert {e.key for e in seen.events if isinstance(e, Removed)} == {
                "p/0",
                "p/2",
                "p/3",
                "p/4",
            }


async def test_a_large_backlog_arrives_whole_and_in_order(
    own_etcd: EmbeddedEtcd, proxy: Proxy
) -> None:
    async with (
        EtcdStore(config(own_etcd.endpoint)) as writer,
        EtcdStore(config(proxy.endpoint)) as reader,
    ):
        seen = Follower(reader.watch("a/", "z/"))
        await seen.until_synced()
        await proxy.cut()
        # More revisions than etcd sends in one batch (1,000), and one batch larger than it sends in
        # one message (the request limit of 8 MiB and a half), so that it fragments.
        async with asyncio.TaskGroup() as group:
            for n in range(1_500):
                group.create_task(writer.put(f"{'az'[n % 2]}/{n}", b""))
        for n in range(12):
            await writer.put(f"a/large/{n}", b"x" * 1_000_000)
        await proxy.restore()
        await seen.until(lambda s: len(s.values) == 1_512)
        revisions = seen.revisions()
        assert revisions == sorted(revisions)


# -- several endpoints


async def test_a_dead_endpoint_is_left_for_the_living(own_etcd: EmbeddedEtcd) -> None:
    chance = InOrder(1)
    async with EtcdStore(config(DEAD, own_etcd.endpoint), chance=chance) as store:
        await store.put("p/a", b"")
        lease = await store.grant(60)
        assert await store.keep_alive(lease) == 60
        seen = Follower(store.watch("p/"))
        await seen.until_synced()
        assert seen.values == {"p/a": b""}


async def test_streams_alone_find_the_living_endpoint(own_etcd: EmbeddedEtcd) -> None:
    async with EtcdStore(config(own_etcd.endpoint)) as store:
        lease = await store.grant(60)
    async with EtcdStore(config(DEAD, own_etcd.endpoint), chance=InOrder(1)) as store:
        assert await store.keep_alive(lease) == 60


async def test_a_silent_endpoint_leaves_time_to_ask_the_other(
    own_etcd: EmbeddedEtcd, proxy: Proxy
) -> None:
    proxy.swallow()
    servers = config(proxy.endpoint, own_etcd.endpoint, request_timeout_s=2.0)
    async with EtcdStore(servers, chance=InOrder(1)) as store:
        assert await store.get("a") is None
        assert proxy.accepted
        seen = Follower(store.watch("p/"))
        await seen.until_synced()


async def test_everything_moves_when_the_endpoint_in_use_dies(
    own_etcd: EmbeddedEtcd, proxy: Proxy
) -> None:
    servers = config(proxy.endpoint, own_etcd.endpoint, request_timeout_s=2.0)
    async with EtcdStore(servers, chance=InOrder(1)) as store:
        lease = await store.grant(60)
        seen = Follower(store.watch("p/"))
        await seen.until_synced()
        assert await store.keep_alive(lease) == 60
        await proxy.cut()
        await keep_trying(lambda: store.put("p/a", b""))
        await seen.until_values({"p/a": b""})
        assert await store.keep_alive(lease) == 60


# -- refusals


async def test_a_full_etcd_is_exhausted_and_says_what_to_do(tmp_path: Path) -> None:
    small = ("--quota-backend-bytes=2000000",)
    async with (
        EmbeddedEtcd(tmp_path / "data", extra_arguments=small) as server,
        EtcdStore(config(server.endpoint)) as store,
    ):
        with pytest.raises(Exhausted, match=r"out of space.*--quota-backend-bytes"):
            await _fill(store)
        assert await store.get("p/0") is not None


async def test_an_oversized_value_is_invalid_before_it_is_sent() -> None:
    async with EtcdStore(config(DEAD)) as store:
        with pytest.raises(Invalid, match="exceeds the 1572864"):
            await store.put("a", b"x" * 1_600_000)


async def test_no_endpoint_at_all_is_unusable() -> None:
    with pytest.raises(Unusable, match=r"etcd\.endpoints is empty"):
        EtcdStore(config())


async def test_a_watch_outside_its_store_is_refused() -> None:
    store = EtcdStore(config(DEAD))
    with pytest.raises(RuntimeError, match="outside its `async with`"):
        await anext(store.watch("p/"))
    await store.close()
