from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from services.runtime.errors import Unusable
from services.runtime.etcd_process import EmbeddedEtcd
from services.store.etcd import EtcdStore
from tests.fakes.clock import FakeClock
from tests.fakes.etcd import HAVE_ETCD, NO_ETCD, config

pytestmark = pytest.mark.skipif(not HAVE_ETCD, reason=NO_ETCD)


async def test_data_of_an_earlier_run_is_served_again_on_other_ports(tmp_path: Path) -> None:
    async with (
        EmbeddedEtcd(tmp_path / "data") as first,
        EtcdStore(config(first.endpoint)) as store,
    ):
        await store.put("a", b"kept")
    async with (
        EmbeddedEtcd(tmp_path / "data") as second,
        EtcdStore(config(second.endpoint)) as store,
    ):
        kv = await store.get("a")
        assert kv is not None
        assert kv.value == b"kept"
    assert not second.pid_file.exists()


async def test_an_etcd_that_cannot_start_is_quoted(tmp_path: Path) -> None:
    wrong = EmbeddedEtcd(tmp_path / "data", extra_arguments=("--initial-cluster=a=http://b:1",))
    with pytest.raises(Unusable, match=r"ended with status \d+: .*local name .*tessera"):
        await wrong.start()
    assert wrong.pid is None


async def test_a_second_etcd_on_the_same_data_is_refused_by_pid(tmp_path: Path) -> None:
    async with EmbeddedEtcd(tmp_path / "data") as first:
        with pytest.raises(Unusable, match=rf"etcd \(pid {first.pid}\) still runs"):
            await EmbeddedEtcd(tmp_path / "data").start()


async def test_a_taken_port_is_quoted(tmp_path: Path) -> None:
    async with EmbeddedEtcd(tmp_path / "one") as first:
        port = int(first.endpoint.rpartition(":")[2])
        with pytest.raises(Unusable, match="address already in use"):
            await EmbeddedEtcd(tmp_path / "two", client_port=port).start()


async def test_a_frozen_etcd_is_stopped_all_the_same(tmp_path: Path) -> None:
    server = EmbeddedEtcd(tmp_path / "data")
    await server.start()
    server.send_signal(signal.SIGSTOP)
    await server.stop()
    await server.stop()
    assert server.pid is None


async def test_the_end_of_etcd_can_be_waited_for(tmp_path: Path) -> None:
    async with EmbeddedEtcd(tmp_path / "data") as server, asyncio.timeout(20):
        server.send_signal(signal.SIGKILL)
        await server.wait()


async def test_a_start_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    clock = FakeClock()
    server = EmbeddedEtcd(tmp_path / "data", clock=clock)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        task = group.create_task(server.start())
        # It sleeps between two looks at a child that is not healthy yet.
        while not clock.sleeping:  # noqa: ASYNC110 - the clock has no event for it
            await asyncio.sleep(0)
        pid = int(server.pid_file.read_text())
        task.cancel()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not server.pid_file.exists()


async def test_no_etcd_on_the_path_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unusable, match="install etcd-server"):
        await EmbeddedEtcd(tmp_path / "data").start()
