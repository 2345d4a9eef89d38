"""Warnings of an apply that only the cluster can tell."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.runtime.clock import SystemClock
from services.store.memory import MemoryStore
from tests.fakes import cluster_keys as keys
from tests.fakes.running_policyd import Running, running_policyd

API = 1002


@pytest.fixture
async def policyd(tmp_path: Path) -> AsyncIterator[Running]:
    async with (
        MemoryStore(SystemClock()) as store,
        running_policyd(store, tmp_path) as running,
    ):
        await running.put(keys.identity(API, keys.pod("api")))
        yield running


async def warnings(policyd: Running, manifest: str) -> list[tuple[int, str]]:
    answer = await policyd.apply(manifest, dry_run=True)
    assert {problem.severity for problem in answer.problems} <= {"warning"}
    return [(problem.line, problem.message) for problem in answer.problems]


async def test_selectors_of_nobody_are_named_with_their_lines(policyd: Running) -> None:
    assert await warnings(policyd, keys.allow("api", "api", "api")) == []
    (subject,) = await warnings(policyd, keys.allow("db", "db", "api"))
    assert subject == (4, "it selects no endpoint now")
    (line, peer) = (await warnings(policyd, keys.allow("api", "api", "wbe")))[0]
    assert line == 7
    assert peer.startswith("nobody has app=wbe,k8s:io.kubernetes.pod.namespace=shop now")


async def test_what_comes_later_ends_the_warning(policyd: Running) -> None:
    manifest = keys.allow("db", "db", "api")
    assert await warnings(policyd, manifest)
    revision = await policyd.put(keys.identity(1003, keys.pod("db")))
    await policyd.policyd.view.reached(revision)
    assert await warnings(policyd, manifest) == []
