"""The agent's addresses, against ipamd on the memory store: windows, log, outages, restarts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tessera_wire.ipam.v1.ipam_pb2_grpc import IpamServiceStub

from datapath.agent.addressing import Addressing, Given
from datapath.agent.addresslog import FILE, AddressLog
from datapath.agent.record import EndpointRecord, State
from ipam.block import address_text
from services.runtime.clock import SystemClock
from services.runtime.config import PoolConfig
from services.runtime.errors import Conflict, Exhausted, Retry
from services.wire.client import channel
from tests.fakes.address_service import check_store
from tests.fakes.served_ipamd import Service, service


@dataclass
class Node:
    """One agent's addressing, in runs; the folder outlives them."""

    service: Service
    folder: Path
    records: dict[int, EndpointRecord] = field(default_factory=dict)

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Addressing]:
        log = AddressLog(self.folder)
        async with channel(self.service.target) as dialled:
            yield Addressing(
                IpamServiceStub(dialled),
                "node-a",
                journal=log,
                records=lambda: self.records.values(),
                networks=tuple,
                clock=SystemClock(),
            )
        log.close()

    def record(self, number: int, **fields) -> EndpointRecord:
        made = EndpointRecord(
            number, "shop", f"w{number}", (), "ns", "eth0", f"tes{number}", State.CREATING, **fields
        )
        self.records[number] = made
        return made

    def ready(self, record: EndpointRecord, given: Given) -> EndpointRecord:
        made = replace(record, state=State.READY, address=given.ipv4, address6=given.ipv6)
        self.records[record.id] = made
        return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "node").mkdir()
    return tmp_path / "node"


def wipe(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


async def windows(addressing: Addressing) -> None:
    for _ in range(3):
        await addressing.sync()


def texts(given: Given) -> str:
    return f"{address_text(given.ipv4)},{address_text(given.ipv6)}"


async def test_without_a_window_yet_the_service_is_asked(tmp_path: Path, folder: Path) -> None:
    async with service(tmp_path) as ipamd:
        node = Node(ipamd, folder)
        async with node.run() as addressing:
            given = await addressing.allocate(node.record(1))
            assert given == await addressing.allocate(node.records[1])
        assert await check_store(ipamd.store) == {"shop/w1 eth0": texts(given)}


async def test_with_windows_an_outage_is_not_noticed(tmp_path: Path, folder: Path) -> None:
    async with service(tmp_path) as ipamd:
        node = Node(ipamd, folder)
        async with node.run() as addressing:
            await windows(addressing)
            await ipamd.stop()
            given = [await addressing.allocate(node.record(n)) for n in range(5)]
            assert len({(g.ipv4, g.ipv6) for g in given}) == 5
            await addressing.release(node.records.pop(0))
            with pytest.raises(Retry):
                await addressing.tell()
            assert await check_store(ipamd.store) == {}
            await ipamd.start()
            await until_told(addressing)
        assert await check_store(ipamd.store) == {
            f"shop/w{n} eth0": texts(given[n]) for n in range(1, 5)
        }


async def until_told(addressing: Addressing) -> None:
    async with asyncio.timeout(20):
        while addressing._local.pending:
            try:
                await addressing.tell()
            except Retry:
                await asyncio.sleep(0.05)


async def test_an_agent_killed_after_the_answer_still_has_the_address(
    tmp_path: Path, folder: Path
) -> None:
    async with service(tmp_path) as ipamd:
        node = Node(ipamd, folder)
        async with node.run() as addressing:
            await windows(addressing)
            first = await addressing.allocate(node.record(1))
            node.ready(node.records[1], first)
        await ipamd.stop()  # the next run has the disk alone
        async with node.run() as addressing:
            await addressing.settle()
            assert await addressing.allocate(node.records[1]) == first
            assert await addressing.allocate(node.record(2)) != first


async def test_what_no_endpoint_has_any_more_is_given_back_at_start(
    tmp_path: Path, folder: Path
) -> None:
    async with service(tmp_path) as ipamd:
        node = Node(ipamd, folder)
        async with node.run() as addressing:
            await windows(addressing)
            await addressing.allocate(node.record(1))
            await addressing.tell()
        node.records.clear()
        async with node.run() as addressing:
            await addressing.settle()
            await addressing.tell()
        assert await check_store(ipamd.store) == {}


@pytest.mark.parametrize("lost", [1, 5, 20])
async def test_a_torn_end_costs_what_was_torn_and_no_more(
    tmp_path: Path, folder: Path, lost: int
) -> None:
    async with service(tmp_path) as ipamd:
        node = Node(ipamd, folder)
        async with node.run() as addressing:
            await windows(addressing)
            kept = await addressing.allocate(node.record(1))
            node.ready(node.records[1], kept)
            await addressing.allocate(node.record(2))
        log = folder / FILE
        log.write_bytes(log.read_bytes()[:-lost])
        del node.records[2]
        async with node.run() as addressing:
            await addressing.settle()
            assert await addressing.allocate(node.records[1]) == kept
            assert (await addressing.allocate(node.record(3))).ipv4 != kept.ipv4
            await addressing.tell()
        assert set(await check_store(ipamd.store)) == {"shop/w1 eth0", "shop/w3 eth0"}


async def test_with_the_log_lost_live_endpoints_keep_their_addresses(
    tmp_path: Path, folder: Path
) -> None:
    async with service(tmp_path) as ipamd:
        node = Node(ipamd, folder)
        async with node.run() as addressing:
            await windows(addressing)
            given = await addressing.allocate(node.record(1))
            node.ready(node.records[1], given)  # and the store was never told
        wipe(folder)
        async with node.run() as addressing:
            await addressing.settle()
            await windows(addressing)
            await addressing.settle()
            others = [await addressing.allocate(node.record(n)) for n in range(2, 20)]
            assert given.ipv4 not in {other.ipv4 for other in others}
            await until_told(addressing)
        held = await check_store(ipamd.store)
        assert address_text(given.ipv4) in held["shop/w1 eth0"]


async def test_a_full_disk_gives_nothing_out_and_loses_nothing(
    tmp_path: Path, folder: Path
) -> None:
    async with service(tmp_path) as ipamd:
        node = Node(ipamd, folder)
        async with node.run() as addressing:
            await windows(addressing)
            first = await addressing.allocate(node.record(1))
            journal = addressing._journal
            full = os.open("/dev/full", os.O_WRONLY)
            kept, journal._descriptor = journal._descriptor, full
            with pytest.raises(Exhausted, match="No space left on device; make room there"):
                await addressing.allocate(node.record(2))
            journal._descriptor = kept
            second = await addressing.allocate(node.records[2])
            assert second != first
            os.close(full)
        async with node.run() as addressing:
            assert await addressing.allocate(node.records[1]) == first
            assert await addressing.allocate(node.records[2]) == second


async def test_the_log_stays_short(tmp_path: Path, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr("datapath.agent.addresslog.GROWN_BYTES", 4096)
    async with service(tmp_path) as ipamd:
        node = Node(ipamd, folder)
        async with node.run() as addressing:
            await windows(addressing)
            for n in range(200):
                await addressing.allocate(node.record(n))
                await addressing.release(node.records.pop(n))
                if n % 10 == 0:
                    await until_told(addressing)
            await until_told(addressing)
            last = await addressing.allocate(node.record(999))
        assert (folder / FILE).stat().st_size < 3 * 4096
        async with node.run() as addressing:
            assert await addressing.allocate(node.records[999]) == last


async def test_a_static_and_a_kept_address(tmp_path: Path, folder: Path) -> None:
    static = {"default": PoolConfig(cidrs=("10.0.0.0/24",), local=False)}
    async with service(tmp_path, static) as ipamd:
        node = Node(ipamd, folder)
        async with node.run() as addressing:
            await windows(addressing)
            wanted = node.record(1, static=("10.0.0.77",), retain_s=600)
            assert address_text((await addressing.allocate(wanted)).ipv4) == "10.0.0.77"
            await addressing.release(wanted)
            with pytest.raises(Conflict, match="is kept for shop/w1"):
                await addressing.allocate(node.record(2, static=("10.0.0.77",)))


async def test_a_node_that_leaves_gives_everything_back(tmp_path: Path, folder: Path) -> None:
    async with service(tmp_path) as ipamd:
        node = Node(ipamd, folder)
        async with node.run() as addressing:
            await windows(addressing)
            for n in range(20):
                node.ready(node.record(n), await addressing.allocate(node.records[n]))
            await addressing.leave()
            assert addressing._local.windows == {}
        assert await check_store(ipamd.store) == {}


async def test_beside_it_windows_log_and_inventory_are_kept_going(
    tmp_path: Path, folder: Path
) -> None:
    async with service(tmp_path) as ipamd:
        node = Node(ipamd, folder)
        async with node.run() as addressing, asyncio.TaskGroup() as tasks:
            running = tasks.create_task(addressing.run())
            await until(lambda: bool(addressing._local.windows))
            given = [await addressing.allocate(node.record(n)) for n in range(30)]
            assert len({one.ipv4 for one in given}) == 30
            await until(lambda: not addressing._local.pending)
            running.cancel()
        assert len(await check_store(ipamd.store)) == 30


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110 - it has no event for every step
            await asyncio.sleep(0.02)
