"""What every store promises, whichever it is."""

from __future__ import annotations

import asyncio

import pytest

from services.runtime.errors import Invalid, NotFound
from services.store.model import (
    Changed,
    Compare,
    Delete,
    DeleteResult,
    LeaseId,
    Put,
    PutResult,
    Range,
    RangeResult,
    Relation,
    Removed,
    Store,
    Synced,
    Target,
    Txn,
    TxnResult,
)
from services.store.txn import (
    absent,
    bulk_txn,
    delete_prefix,
    mod_is,
    prefix_empty,
    present,
    value_is,
)
from tests.fakes.etcd import DEADLINE_S, Follower, keys_of

GONE = LeaseId(0x1234)


# -- keys


async def test_a_key_never_written_is_none(store: Store) -> None:
    assert await store.get("a") is None


async def test_a_put_is_read_back_with_its_revisions(store: Store) -> None:
    first = await store.put("a", b"1")
    second = await store.put("a", b"2")
    kv = await store.get("a")
    assert kv is not None
    assert (kv.key, kv.value, kv.version) == ("a", b"2", 2)
    assert (kv.create_revision, kv.mod_revision) == (first, second)
    assert second == first + 1


async def test_deleting_says_whether_there_was_a_key(store: Store) -> None:
    before = await store.put("a", b"")
    assert await store.delete("a")
    assert not await store.delete("a")
    # A delete that found nothing makes no revision.
    assert await store.put("a", b"") == before + 2
    kv = await store.get("a")
    assert kv is not None
    assert kv.version == 1


async def test_keys_may_hold_any_text(store: Store) -> None:
    key = "p/k8s:app=ü;日本/\x7f 𝄞"
    await store.put(key, b"\x00\xff")
    assert [kv.key for kv in (await store.list("p/k8s:app=ü;")).items] == [key]


async def test_a_listing_is_ascending_and_of_one_revision(store: Store) -> None:
    names = [f"p/{n:03}" for n in range(40)]
    for name in reversed(names):
        last = await store.put(name, name.encode())
    await store.put("p", b"not below p/")
    await store.put("p0", b"first key after p/")
    listing = await store.list("p/")
    assert [kv.key for kv in listing.items] == names
    assert [kv.value for kv in listing.items] == [name.encode() for name in names]
    assert listing.revision == last + 2


async def test_the_empty_prefix_lists_everything(store: Store) -> None:
    await store.put("\x01", b"")
    await store.put("\U0010ffff", b"")
    assert [kv.key for kv in (await store.list("")).items] == ["\x01", "\U0010ffff"]


async def test_an_empty_listing_has_a_revision(store: Store) -> None:
    revision = await store.put("a", b"")
    listing = await store.list("none/")
    assert (listing.revision, listing.items) == (revision, ())


# -- transactions


async def test_the_branch_taken_answers(store: Store) -> None:
    txn = Txn((absent("a"),), (Put("a", b"1"),), (Range("a"),))
    first = await store.txn(txn)
    assert (first.succeeded, first.results) == (True, (PutResult(),))
    second = await store.txn(txn)
    assert not second.succeeded
    (answer,) = second.results
    assert isinstance(answer, RangeResult)
    assert [kv.value for kv in answer.items] == [b"1"]
    assert second.revision == first.revision


async def test_all_writes_of_a_transaction_share_a_revision(store: Store) -> None:
    result = await store.txn(Txn(success=(Put("a", b""), Put("b", b""), Txn((), (Put("c", b""),)))))
    listing = await store.list("")
    assert {kv.mod_revision for kv in listing.items} == {result.revision}


@pytest.mark.parametrize(
    ("compare", "holds"),
    [
        (absent("a"), False),
        (absent("no"), True),
        (present("a"), True),
        (present("no"), False),
        (value_is("a", b"2"), True),
        (value_is("a", b"1"), False),
        (value_is("no", b""), False),
        (Compare("no", Target.VALUE, Relation.NOT_EQUAL, b"x"), False),
        (Compare("a", Target.VALUE, Relation.NOT_EQUAL, b"x"), True),
        (Compare("a", Target.VALUE, Relation.GREATER, b"1"), True),
        (Compare("a", Target.VALUE, Relation.LESS, b"1"), False),
        (Compare("a", Target.VERSION, Relation.EQUAL, 2), True),
        (Compare("a", Target.VERSION, Relation.GREATER, 2), False),
        (Compare("a", Target.VERSION, Relation.LESS, 3), True),
        (Compare("no", Target.VERSION, Relation.EQUAL, 0), True),
        (Compare("no", Target.MOD, Relation.LESS, 1), True),
        (Compare("no", Target.CREATE, Relation.NOT_EQUAL, 0), False),
        (prefix_empty("dir/"), False),
        (prefix_empty("none/"), True),
        (Compare("dir/", Target.VERSION, Relation.EQUAL, 1, range_end="dir0"), True),
        (Compare("dir/", Target.VALUE, Relation.EQUAL, b"x", range_end="dir0"), False),
        (Compare("none/", Target.VALUE, Relation.EQUAL, b"x", range_end="none0"), False),
    ],
)
async def test_a_compare_holds_as_etcd_has_it(store: Store, compare: Compare, holds: bool) -> None:
    for key, value in [("a", b"1"), ("a", b"2"), ("dir/x", b"x"), ("dir/y", b"y")]:
        await store.put(key, value)
    assert (await store.txn(Txn((compare,)))).succeeded is holds


async def test_a_revision_compare_tells_a_rewritten_key(store: Store) -> None:
    seen = await store.put("a", b"same")
    await store.put("a", b"same")
    assert not (await store.txn(Txn((mod_is("a", seen),)))).succeeded
    assert not (await store.txn(Txn((value_is("a", b"same"), absent("a"))))).succeeded


async def test_nested_transactions_succeed_and_fail_alone(store: Store) -> None:
    await store.put("taken", b"")
    result = await store.txn(
        Txn(
            success=(
                Txn((absent("taken"),), (Put("taken", b"!"),), (Range("taken"),)),
                Txn((absent("free"),), (Put("free", b"1"),)),
            )
        )
    )
    taken, free = result.results
    assert isinstance(taken, TxnResult)
    assert isinstance(free, TxnResult)
    assert (taken.succeeded, free.succeeded) == (False, True)
    assert free.revision == result.revision
    assert isinstance(taken.results[0], RangeResult)


async def test_compares_are_judged_before_the_first_write(store: Store) -> None:
    result = await store.txn(
        Txn(success=(Put("a", b"1"), Txn((absent("a"),), (Put("b", b""),), (Put("c", b""),))))
    )
    assert result.succeeded
    assert [kv.key for kv in (await store.list("")).items] == ["a", "b"]


async def test_a_range_sees_what_the_transaction_wrote_before_it(store: Store) -> None:
    result = await store.txn(Txn(success=(Put("a", b"1"), Range("a"), Delete("b"), Range("a"))))
    answer = result.results[1]
    assert isinstance(answer, RangeResult)
    assert [kv.value for kv in answer.items] == [b"1"]


async def test_ranges_limit_count_and_omit_values(store: Store) -> None:
    for n in range(5):
        await store.put(f"p/{n}", b"v")
    result = await store.txn(
        Txn(
            success=(
                Range("p/", "p0", limit=2),
                Range("p/", "p0", count_only=True),
                Range("p/", "p0", keys_only=True),
            )
        )
    )
    limited, counted, named = result.results
    assert isinstance(limited, RangeResult)
    assert isinstance(counted, RangeResult)
    assert isinstance(named, RangeResult)
    assert ([kv.key for kv in limited.items], limited.count) == (["p/0", "p/1"], 5)
    assert (counted.items, counted.count) == ((), 5)
    assert {kv.value for kv in named.items} == {b""}


async def test_a_range_delete_counts_what_it_removed(store: Store) -> None:
    for key in ("p/1", "p/2", "q"):
        await store.put(key, b"")
    result = await store.txn(Txn(success=(delete_prefix("p/"),)))
    assert result.results == (DeleteResult(2),)
    assert [kv.key for kv in (await store.list("")).items] == ["q"]


async def test_a_bulk_of_puts_is_one_transaction(store: Store) -> None:
    puts = [Put(f"p/{n:05}", b"v") for n in range(5_000)]
    result = await store.txn(bulk_txn([absent("guard")], [*puts, Put("guard", b"")]))
    assert result.succeeded
    listing = await store.list("p/")
    assert len(listing.items) == 5_000
    assert {kv.mod_revision for kv in listing.items} == {result.revision}
    again = await store.txn(bulk_txn([absent("guard")], puts))
    assert not again.succeeded


@pytest.mark.parametrize(
    "txn",
    [
        Txn(success=tuple(Put(f"k{n}", b"") for n in range(129))),
        Txn(compares=tuple(absent(f"k{n}") for n in range(129))),
        Txn(success=tuple(Txn((), (Put(f"k{n}", b""),) * 1) for n in range(128))),
        Txn(success=(Put("a", b""), Put("a", b""))),
        Txn(success=(Put("a", b""), Txn((), (Put("a", b""),)))),
        Txn(success=(Txn((), (Put("a", b""),)), Txn((), (), (Put("a", b""),)))),
        Txn(success=(Put("a", b""), Delete("a"))),
        Txn(success=(Put("p/a", b""), delete_prefix("p/"))),
        Txn(success=(Put("a", b"x" * 1_600_000),)),
        Txn((Compare("a", Target.VALUE, Relation.EQUAL, 1),)),
    ],
    ids=[
        "too wide",
        "too many compares",
        "too wide along a path",
        "put twice",
        "put twice, nested",
        "put in two siblings",
        "put and delete",
        "put in a deleted range",
        "too large",
        "operand of another type",
    ],
)
async def test_a_transaction_etcd_would_refuse_is_invalid(store: Store, txn: Txn) -> None:
    await store.put("a", b"")
    with pytest.raises(Invalid):
        await store.txn(txn)


async def test_branches_that_exclude_each_other_may_write_one_key(store: Store) -> None:
    txn = Txn(success=(Txn((absent("a"),), (Put("a", b"new"),), (Put("a", b"old"),)),))
    await store.txn(txn)
    await store.txn(txn)
    kv = await store.get("a")
    assert kv is not None
    assert kv.value == b"old"


# -- leases


async def test_keys_of_a_revoked_lease_vanish(store: Store) -> None:
    lease = await store.grant(60)
    await store.put("a", b"", lease)
    await store.put("b", b"")
    kv = await store.get("a")
    assert kv is not None
    assert kv.lease == lease
    await store.revoke(lease)
    assert [kv.key for kv in (await store.list("")).items] == ["b"]


async def test_revoking_twice_is_harmless(store: Store) -> None:
    lease = await store.grant(60)
    await store.revoke(lease)
    await store.revoke(lease)


async def test_a_keep_alive_tells_time_left_or_zero(store: Store) -> None:
    lease = await store.grant(60)
    assert await store.keep_alive(lease) == 60
    await store.revoke(lease)
    assert await store.keep_alive(lease) == 0


async def test_many_leases_are_kept_alive_at_once(store: Store) -> None:
    leases = [await store.grant(60) for _ in range(20)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(store.keep_alive(lease)) for lease in (*leases, GONE, *leases)]
    assert [task.result() for task in tasks] == [60] * 20 + [0] + [60] * 20


async def test_a_put_on_a_lost_lease_is_not_found_and_writes_nothing(store: Store) -> None:
    with pytest.raises(NotFound):
        await store.put("a", b"", GONE)
    with pytest.raises(NotFound):
        await store.txn(Txn(success=(Put("b", b""), Txn((), (Put("a", b"", GONE),)))))
    assert (await store.list("")).items == ()


async def test_a_lost_lease_in_the_branch_not_taken_is_harmless(store: Store) -> None:
    result = await store.txn(Txn((absent("a"),), (Put("a", b""),), (Put("b", b"", GONE),)))
    assert result.succeeded


async def test_a_put_without_the_lease_lets_go_of_it(store: Store) -> None:
    lease = await store.grant(60)
    await store.put("a", b"", lease)
    await store.put("a", b"")
    await store.revoke(lease)
    assert await store.get("a") is not None


async def test_a_lost_lease_removes_its_keys_in_the_watch(store: Store) -> None:
    lease = await store.grant(2)
    await store.put("p/a", b"", lease)
    seen = Follower(store.watch("p/"))
    await seen.until_synced()
    await seen.until(lambda s: s.values == {})
    assert isinstance(seen.events[-1], Removed)
    assert await store.keep_alive(lease) == 0


# -- watches


async def test_a_watch_lists_then_follows(store: Store) -> None:
    for n in range(20):
        last = await store.put(f"p/{n:02}", b"old")
    seen = Follower(store.watch("p/"))
    await seen.until_synced()
    assert keys_of(seen.events) == [f"p/{n:02}" for n in range(20)]
    assert seen.events[-1] == Synced(last)
    await store.put("p/07", b"new")
    await store.delete("p/08")
    await store.put("q", b"elsewhere")
    await seen.until(lambda s: s.values.get("p/07") == b"new" and "p/08" not in s.values)
    assert "q" not in seen.values


async def test_a_watch_of_nothing_is_synced_at_once(store: Store) -> None:
    seen = Follower(store.watch("none/"))
    assert isinstance((await seen.step())[-1], Synced)


async def test_prefixes_are_listed_at_one_revision_and_followed_in_order(store: Store) -> None:
    for n in range(10):
        await store.put(f"a/{n}", b"")
        await store.put(f"z/{n}", b"")
    seen = Follower(store.watch("z/", "a/"))
    await seen.until_synced()
    assert len(seen.values) == 20
    for n in range(30):
        await store.put(f"{'az'[n % 2]}/{n}", b"")
        await store.put(f"m/{n}", b"between the prefixes")
    await seen.until(lambda s: len(s.values) == 40)
    revisions = seen.revisions()
    assert revisions == sorted(revisions)
    assert not any(key.startswith("m/") for key in keys_of(seen.events))


async def test_overlapping_prefixes_tell_everything_once(store: Store) -> None:
    await store.put("a/b/c", b"")
    seen = Follower(store.watch("a/b/", "a/", "a/"))
    await seen.until_synced()
    await store.put("a/b/d", b"")
    await seen.until(lambda s: "a/b/d" in s.values)
    assert keys_of(seen.events) == ["a/b/c", "a/b/d"]


async def test_a_transaction_arrives_in_one_batch(store: Store) -> None:
    seen = Follower(store.watch("a/", "b/"))
    await seen.until_synced()
    await store.txn(Txn(success=(Put("a/1", b""), Put("b/1", b""), Put("a/2", b""))))
    batch = await seen.step()
    assert sorted(keys_of(batch)) == ["a/1", "a/2", "b/1"]


async def test_a_busy_consumer_gets_the_last_of_each_key(store: Store) -> None:
    seen = Follower(store.watch("p/"))
    await seen.until_synced()
    for n in range(50):
        await store.put("p/counter", str(n).encode())
        last = await store.put("p/other", str(n).encode())
    await seen.until_values({"p/counter": b"49", "p/other": b"49"})
    for batch in seen.batches:
        names = keys_of(batch)
        assert len(names) == len(set(names))
    revisions = seen.revisions()
    assert revisions == sorted(revisions)
    assert revisions[-1] == last


async def test_two_watches_do_not_disturb_each_other(store: Store) -> None:
    one, two = Follower(store.watch("p/")), Follower(store.watch("p/"))
    await one.until_synced()
    await two.until_synced()
    await store.put("p/a", b"")
    await one.until_values({"p/a": b""})
    await two.until_values({"p/a": b""})


async def test_closing_the_store_ends_its_watches(store: Store) -> None:
    seen: list[object] = []
    synced = asyncio.Event()

    async def follow() -> None:
        async for batch in store.watch("p/"):
            seen.extend(batch)
            synced.set()

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        group.create_task(follow())
        await synced.wait()
        await store.close()
    assert not [event for event in seen if isinstance(event, Changed)]
