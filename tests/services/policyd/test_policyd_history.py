"""What policies were, and the way back, over real gRPC on a memory store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tessera_wire.policy.v1 import policy_pb2 as pb

from services.policy.clauses import PolicyRef
from services.policyd import history
from services.policyd.history import Change, Record, back_to
from services.runtime.clock import SystemClock
from services.runtime.errors import Invalid, NotFound
from services.store.memory import MemoryStore
from services.store.model import Revision
from services.wire.client import call
from tests.fakes import cluster_keys as keys
from tests.fakes.running_policyd import DEADLINE_S, Running, running_policyd


@pytest.fixture
async def policyd(tmp_path: Path) -> AsyncIterator[Running]:
    async with (
        MemoryStore(SystemClock()) as store,
        running_policyd(store, tmp_path) as running,
    ):
        yield running


def wire_ref(name: str) -> pb.PolicyRef:
    return pb.PolicyRef(kind="CiliumNetworkPolicy", namespace="shop", name=name)


async def changes(policyd: Running, name: str = "", limit: int = 0) -> list[pb.PolicyChange]:
    ref = wire_ref(name) if name else pb.PolicyRef()
    request = pb.HistoryRequest(ref=ref, limit=limit)
    return list((await call(policyd.admin.History, request, deadline_s=DEADLINE_S)).changes)


async def back(policyd: Running, revision: int, name: str = "", *, dry_run: bool = False):
    ref = wire_ref(name) if name else pb.PolicyRef()
    request = pb.RollbackRequest(ref=ref, revision=revision, author="bob", dry_run=dry_run)
    done = await call(policyd.admin.Rollback, request, deadline_s=DEADLINE_S)
    return {p.ref.name: p.action for p in done.policies}


async def manifests(policyd: Running) -> dict[str, str]:
    return {p.ref.name: p.manifest.decode() for p in (await policyd.list()).policies}


FIRST = keys.allow("api", "api", "web")
SECOND = keys.allow("api", "api", "web", 81)
OTHER = keys.allow("db", "db", "api")


async def test_every_change_is_told_with_its_author_and_difference(policyd: Running) -> None:
    one = await policyd.apply(FIRST)
    two = await policyd.apply(SECOND)
    gone = await policyd.delete(wire_ref("api"))
    told = await changes(policyd, "api")
    assert [c.revision for c in told] == [gone.revision, two.revision, one.revision]
    assert [c.action for c in told] == ["deleted", "configured", "created"]
    assert [c.author for c in told] == ["", "ann", "ann"]
    assert '-    toPorts: [{ports: [{port: "80", protocol: TCP}]}]' in told[1].diff.splitlines()
    assert '+    toPorts: [{ports: [{port: "81", protocol: TCP}]}]' in told[1].diff.splitlines()
    assert told[2].manifest.decode() == FIRST
    assert all(c.changed_at.endswith("Z") for c in told)


async def test_what_changes_nothing_is_no_change(policyd: Running) -> None:
    await policyd.apply(FIRST)
    await policyd.apply(FIRST)
    await policyd.apply(SECOND, dry_run=True)
    assert len(await changes(policyd)) == 1


async def test_one_policy_goes_back_and_the_others_stay(policyd: Running) -> None:
    one = await policyd.apply(FIRST)
    await policyd.apply(SECOND)
    await policyd.apply(OTHER)
    assert await back(policyd, one.revision, "api", dry_run=True) == {"api": "configured"}
    assert (await manifests(policyd))["api"] == SECOND
    assert await back(policyd, one.revision, "api") == {"api": "configured"}
    assert await manifests(policyd) == {"api": FIRST, "db": OTHER}
    (newest, *_) = await changes(policyd, "api")
    assert (newest.author, newest.action) == ("bob", "configured")


async def test_all_of_them_go_back_at_once(policyd: Running) -> None:
    one = await policyd.apply(FIRST)
    await policyd.apply(SECOND + "---\n" + OTHER)
    await policyd.delete(wire_ref("api"))
    assert await back(policyd, one.revision) == {"api": "created", "db": "deleted"}
    assert await manifests(policyd) == {"api": FIRST}
    assert await back(policyd, one.revision) == {}
    first, second, *_ = await changes(policyd)
    assert first.revision == second.revision, "two transactions"


async def test_a_revision_to_come_and_a_policy_that_never_was_are_refused(
    policyd: Running,
) -> None:
    await policyd.apply(FIRST)
    with pytest.raises(Invalid, match="is in the future"):
        await back(policyd, 10_000)
    with pytest.raises(NotFound, match="has no history"):
        await back(policyd, 1, "nobody")


async def test_only_the_newest_changes_are_kept(policyd: Running) -> None:
    first = await policyd.apply(FIRST)
    for port in range(1000, 1000 + history.KEPT):
        await policyd.apply(keys.allow("api", "api", "web", port))
    assert len(await changes(policyd, "api")) == history.KEPT
    with pytest.raises(Invalid, match="is not known: its history begins at revision"):
        await back(policyd, first.revision, "api")


def test_a_policy_from_before_there_was_a_history_is_not_guessed() -> None:
    ref = PolicyRef("K", "n", "p")
    assert back_to(7, {}, {ref: (Revision(7), "old")}).manifests == ()
    with pytest.raises(Invalid, match="was not recorded then"):
        back_to(6, {}, {ref: (Revision(7), "old")})


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["", "x", "y"])), max_size=12))
def test_back_to_any_revision_is_what_was_there(steps: list[tuple[str, str]]) -> None:
    """The empty text deletes."""
    told: dict[PolicyRef, list[Change]] = {}
    now: dict[PolicyRef, tuple[Revision, str]] = {}
    states = [dict(now)]
    for number, (name, text) in enumerate(steps, start=1):
        ref, revision = PolicyRef("K", "n", name), Revision(number)
        if text:
            record = Record("configured" if ref in now else "created", text)
            now[ref] = (revision, text)
        elif ref in now:
            record = Record("deleted")
            del now[ref]
        else:
            states.append(dict(now))
            continue
        told.setdefault(ref, []).append(Change(ref, revision, record))
        states.append(dict(now))
    for revision, then in enumerate(states):
        way = back_to(revision, told, now)
        after = {ref: text for ref, (_, text) in now.items() if ref not in way.gone}
        after |= dict(way.manifests)
        assert after == {ref: text for ref, (_, text) in then.items()}
