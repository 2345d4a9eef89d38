"""Each contract test runs on the memory store and on a real etcd, one server for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.runtime.clock import SystemClock
from services.runtime.etcd_process import EmbeddedEtcd
from services.store.etcd import EtcdStore
from services.store.memory import MemoryStore
from services.store.model import Store, Txn
from services.store.txn import delete_prefix
from tests.fakes.etcd import HAVE_ETCD, NO_ETCD, config


@pytest.fixture(scope="session")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedEtcd]:
    if not HAVE_ETCD:
        pytest.skip(NO_ETCD)
    server = EmbeddedEtcd(tmp_path_factory.mktemp("etcd") / "data")
    # A loop of its own: it outlives those of the tests.
    with asyncio.Runner() as runner:
        runner.run(server.start())
        yield server
        runner.run(server.stop())


@pytest.fixture(params=["memory", "etcd"])
def endpoint(request: pytest.FixtureRequest) -> str:
    """Empty for the memory store."""
    if request.param == "memory":
        return ""
    server: EmbeddedEtcd = request.getfixturevalue("etcd_server")
    return server.endpoint


@pytest.fixture
async def store(endpoint: str) -> AsyncIterator[Store]:
    if not endpoint:
        async with MemoryStore(SystemClock()) as memory:
            yield memory
        return
    async with EtcdStore(config(endpoint), page_keys=7) as etcd:
        await etcd.txn(Txn(success=(delete_prefix(""),)))
        yield etcd


@pytest.fixture
async def own_etcd(tmp_path: Path) -> AsyncIterator[EmbeddedEtcd]:
    """A server this test may stop, freeze and kill."""
    if not HAVE_ETCD:
        pytest.skip(NO_ETCD)
    async with EmbeddedEtcd(tmp_path / "data") as server:
        yield server
