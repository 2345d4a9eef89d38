"""Questions over gRPC: lists at one revision, references, numbers left, a watch that resumes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tessera_wire.identity.v1 import queries_pb2 as pb

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.identityd.feed import HISTORY, Change, ChangeKind
from services.identityd.trend import FORESEEN_AFTER_S, SAMPLE_S, Trend
from services.runtime.clock import SystemClock
from services.runtime.errors import Conflict, Invalid, NotFound
from services.store.memory import MemoryStore
from services.store.model import Revision
from services.wire.client import call, receive
from tests.fakes.clock import FakeClock
from tests.fakes.identity_replica import replica, until
from tests.fakes.running_identityd import NODE, RunningIdentityd, running_identityd

DEADLINE_S = 10.0


@pytest.fixture
async def identityd(tmp_path: Path) -> AsyncIterator[RunningIdentityd]:
    clock = SystemClock()
    async with (
        MemoryStore(clock) as store,
        running_identityd(store, clock, tmp_path) as running,
    ):
        yield running


async def page(identityd: RunningIdentityd, **request: object) -> pb.ListResponse:
    return await call(identityd.asked.List, pb.ListRequest(**request), deadline_s=DEADLINE_S)


def ids(answer: pb.ListResponse) -> list[int]:
    return [one.id for one in answer.identities]


def forget(identityd: RunningIdentityd) -> None:
    """As many changes as the history holds."""
    view = identityd.replica.view
    for _ in range(HISTORY + 1):
        view.revision = Revision(view.revision + 1)
        number = NumericIdentity(65_000)
        view.feed.add(Change(view.revision, ChangeKind.REFERENCED, number, Labels.EMPTY, "n"))
    view.feed.flush()


# ------------------------------------------------------------------ lists


async def test_pages_are_of_one_revision_whatever_happens_meanwhile(
    identityd: RunningIdentityd,
) -> None:
    was = sorted(await identityd.allocate(*(f"k8s:tier=a{i}" for i in range(9))))
    first = await page(identityd, selector="tier", limit=3)
    assert (ids(first), first.more) == (was[:3], True)
    await identityd.remove(was[4], was[7])
    await identityd.allocate(*(f"k8s:tier=new{i}" for i in range(9)))
    rest = await page(identityd, selector="tier", after=was[2], revision=first.revision)
    assert (ids(rest), rest.revision, rest.more) == (was[3:], first.revision, False)
    # The one that is gone has the labels it had.
    assert "k8s:tier=a" in rest.identities[1].labels
    newest = await page(identityd, selector="tier")
    assert len(ids(newest)) == 9 - 2 + 9


async def test_a_page_that_can_no_longer_be_read_is_told_as_such(
    identityd: RunningIdentityd,
) -> None:
    await identityd.allocate("k8s:tier=a", "k8s:tier=b")
    first = await page(identityd, limit=1)
    forget(identityd)
    with pytest.raises(Conflict, match="begin anew"):
        await page(identityd, limit=1, after=1, revision=first.revision)


async def test_the_standing_identities_are_listed_too(identityd: RunningIdentityd) -> None:
    found = {one.id: one for one in (await page(identityd, selector="reserved:host")).identities}
    assert list(found) == [1]
    assert (found[1].labels, found[1].scope) == ("reserved:host=;", "reserved")


async def test_a_selector_that_cannot_be_read_is_refused(identityd: RunningIdentityd) -> None:
    with pytest.raises(Invalid, match="the forms are"):
        await page(identityd, selector="a b")


# ------------------------------------------------------------------ one identity


async def test_an_identity_is_shown_with_its_nodes_and_addresses(
    identityd: RunningIdentityd,
) -> None:
    [number] = await identityd.allocate("k8s:tier=web")
    await identityd.announce(number, ("shop", "web-1", "10.0.0.9"), ("shop", "web-2", "10.0.0.10"))
    view = identityd.replica.view
    await until(lambda: view.nodes_of(number), "the reference")
    one = await call(identityd.asked.Get, pb.GetRequest(id=number), deadline_s=DEADLINE_S)
    assert (list(one.nodes), one.addresses, one.scope) == ([NODE], 2, "cluster")
    request = pb.ReferencesRequest(id=number)
    found = await call(identityd.asked.References, request, deadline_s=DEADLINE_S)
    [reference] = found.references
    assert (reference.node, reference.held) == (NODE, True)
    assert [a.name for a in reference.addresses] == ["web-2", "web-1"]


@pytest.mark.parametrize(
    ("number", "says"),
    [(255, "not in use"), (1 << 24, "local to one node"), (2**32 - 1, "4294967295")],
)
async def test_a_number_without_an_identity_is_not_found(
    identityd: RunningIdentityd, number: int, says: str
) -> None:
    with pytest.raises(NotFound, match=says):
        await call(identityd.asked.Get, pb.GetRequest(id=number), deadline_s=DEADLINE_S)


@pytest.mark.parametrize(
    ("of", "names"),
    [
        ({"endpoint": "shop/web"}, ["web"]),
        ({"endpoint": "web"}, ["web", "web"]),
        ({"endpoint": "bank/db"}, []),
        ({"cidr": "10.0.0.0/24"}, ["web", "db"]),
        ({"cidr": "::/0"}, ["web"]),
        ({"ip": "10.0.0.9"}, ["db"]),
        ({"ip": "10.0.0.8"}, []),
        ({"node": NODE}, ["web", "db", "web"]),
    ],
)
async def test_addresses_are_found_by_whatever_is_known(
    identityd: RunningIdentityd, of: dict[str, str], names: list[str]
) -> None:
    [number] = await identityd.allocate("k8s:tier=web")
    await identityd.announce(
        number, ("shop", "db", "10.0.0.9"), ("shop", "web", "10.0.0.1"), ("bank", "web", "fd00::1")
    )
    request = pb.AddressesRequest(**of)
    found = await call(identityd.asked.Addresses, request, deadline_s=DEADLINE_S)
    assert [one.name for one in found.addresses] == names


async def test_addresses_come_in_pages_in_the_order_of_addresses(
    identityd: RunningIdentityd,
) -> None:
    [number] = await identityd.allocate("k8s:tier=web")
    endpoints = [("shop", f"web-{i}", f"10.0.0.{i}") for i in (100, 20, 3)]
    await identityd.announce(number, *endpoints)
    first = await call(
        identityd.asked.Addresses,
        pb.AddressesRequest(identity=number, limit=2),
        deadline_s=DEADLINE_S,
    )
    assert ([a.ip for a in first.addresses], first.more) == (["10.0.0.3", "10.0.0.20"], True)
    request = pb.AddressesRequest(identity=number, limit=2, after="10.0.0.20")
    second = await call(identityd.asked.Addresses, request, deadline_s=DEADLINE_S)
    assert ([a.ip for a in second.addresses], second.more) == (["10.0.0.100"], False)


# ------------------------------------------------------------------ numbers


async def test_the_numbers_add_up(identityd: RunningIdentityd) -> None:
    await identityd.allocate(*(f"k8s:tier=a{i}" for i in range(5)))
    stats = await call(identityd.asked.Stats, pb.StatsRequest(), deadline_s=DEADLINE_S)
    assert stats.used == 5
    assert stats.total == stats.used + stats.quarantined + stats.free == 65_536 - 256
    assert stats.references == 5


async def test_usage_shows_the_commonest_values_or_all_of_a_key(
    identityd: RunningIdentityd,
) -> None:
    await identityd.allocate(*(f"k8s:tier=a{i}" for i in range(5)))
    usage = await call(identityd.asked.Usage, pb.UsageRequest(), deadline_s=DEADLINE_S)
    assert [(k.key, k.identities, k.values) for k in usage.keys] == [
        ("tier", 5, 5),
        ("io.cilium.k8s.policy.cluster", 5, 1),
    ]
    assert len(usage.keys[0].commonest) == 3
    request = pb.UsageRequest(key="tier")
    one = await call(identityd.asked.Usage, request, deadline_s=DEADLINE_S)
    assert [len(k.commonest) for k in one.keys] == [5]


async def test_the_forecast_goes_on_as_it_went() -> None:
    clock = FakeClock()
    async with (
        MemoryStore(clock) as store,
        replica(store, clock, numbers=range(1000, 1100)) as one,
    ):
        trend = Trend(one.view, clock)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(trend.count()), tasks.create_task(trend.sample())]
            await until(lambda: clock.sleeping, "the sampler")
            assert trend.rates().exhausted_in_s is None
            lease = await one.open()
            await one.allocate(lease, *(f"k8s:tier=a{i}" for i in range(20)))
            await until(lambda: one.view.in_use == 20, "the identities")
            await clock.advance(SAMPLE_S)
            assert trend.rates().exhausted_in_s is None
            await clock.advance(FORESEEN_AFTER_S)
            rates = trend.rates()
            for task in running:
                task.cancel()
    assert rates.window_s == 70.0
    assert rates.created_per_s == pytest.approx(20 / 70)
    # 80 numbers are left, and 20 went in 70 s.
    assert rates.exhausted_in_s == pytest.approx(80 * 70 / 20)


# ------------------------------------------------------------------ watching


async def until_synced(stream: AsyncIterator[pb.WatchResponse]) -> list[pb.WatchResponse]:
    pieces: list[pb.WatchResponse] = []
    async with asyncio.timeout(DEADLINE_S):
        async for piece in stream:
            pieces.append(piece)
            if piece.synced:
                return pieces
    raise AssertionError("the stream ended")


async def told(stream: AsyncIterator[pb.WatchResponse], count: int) -> tuple[list[object], int]:
    """(kind, id) of so many changes, and the revision of the last piece."""
    changes: list[object] = []
    async with asyncio.timeout(DEADLINE_S):
        async for piece in stream:
            changes += [(change.kind, change.id) for change in piece.changes]
            if len(changes) >= count:
                return changes, piece.revision
    raise AssertionError("the stream ended")


async def test_a_watch_lists_and_then_tells_what_concerns_it(identityd: RunningIdentityd) -> None:
    [here] = await identityd.allocate("k8s:tier=web")
    stream = receive(identityd.asked.Watch, pb.WatchRequest(selector="tier in (web,db)"))
    pieces = await until_synced(stream)
    assert [(c.kind, c.id) for piece in pieces for c in piece.changes] == [(pb.LISTED, here)]
    _, later = await identityd.allocate("k8s:tier=other", "k8s:tier=db")
    await identityd.remove(here)
    changes, _ = await told(stream, 2)
    assert changes == [(pb.CREATED, later), (pb.DELETED, here)]
    await stream.aclose()


async def test_a_watch_goes_on_where_it_was_left(identityd: RunningIdentityd) -> None:
    stream = receive(identityd.asked.Watch, pb.WatchRequest(selector="tier"))
    at = (await until_synced(stream))[-1].revision
    await stream.aclose()
    numbers = await identityd.allocate("k8s:tier=a", "k8s:tier=b")
    again = receive(identityd.asked.Watch, pb.WatchRequest(selector="tier", revision=at))
    first = await anext(again)
    assert (first.reset, first.synced) == (False, False)
    changes, _ = await told(again, 2)
    assert sorted(id_ for _, id_ in changes) == sorted(numbers)
    await again.aclose()


async def test_a_watch_that_was_left_too_long_begins_anew_and_says_so(
    identityd: RunningIdentityd,
) -> None:
    [number] = await identityd.allocate("k8s:tier=a")
    at = identityd.replica.view.revision
    forget(identityd)
    stream = receive(identityd.asked.Watch, pb.WatchRequest(selector="tier", revision=at))
    pieces = await until_synced(stream)
    assert pieces[0].reset
    assert [c.id for piece in pieces for c in piece.changes] == [number]
    await stream.aclose()


async def test_references_are_told_to_who_asks_for_them(identityd: RunningIdentityd) -> None:
    stream = receive(identityd.asked.Watch, pb.WatchRequest(selector="tier", references=True))
    await until_synced(stream)
    [number] = await identityd.allocate("k8s:tier=a")
    changes, _ = await told(stream, 2)
    assert changes == [(pb.CREATED, number), (pb.REFERENCED, number)]
    await stream.aclose()
