"""The whole service over gRPC, on the memory store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tessera_wire.ipam.v1 import ipam_pb2 as pb
from tessera_wire.ipam.v1 import ipam_pb2_grpc

from services.ipamd.main import serve_with
from services.runtime.clock import SystemClock
from services.runtime.config import IpamdConfig, PoolConfig
from services.runtime.errors import Exhausted, Invalid, NotFound, Unusable
from services.store.memory import MemoryStore
from services.wire.client import call, channel

POOLS = {"default": PoolConfig(cidrs=("10.0.0.0/29",), block_size=30)}


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[ipam_pb2_grpc.IpamServiceAsyncStub]:
    config = IpamdConfig(
        listen=f"unix://{folder}/ipamd.sock", metrics_listen="", pools=POOLS, release_cooldown_s=0
    )
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with MemoryStore(SystemClock()) as store, asyncio.TaskGroup() as tasks:
        running = tasks.create_task(serve_with(config, store, SystemClock(), listening))
        async with asyncio.timeout(10):
            target = await listening
        async with channel(target) as dialled:
            yield ipam_pb2_grpc.IpamServiceStub(dialled)
        running.cancel()


def owner(name: str) -> pb.Owner:
    return pb.Owner(namespace="shop", name=name, interface="eth0")


async def allocate(stub, name: str, node: str = "a", address: str = "") -> pb.Address:
    wanted = [address] if address else []
    request = pb.AllocateRequest(node=node, owner=owner(name), addresses=wanted)
    return (await call(stub.Allocate, request, deadline_s=5)).addresses[0]


async def test_an_address_from_asking_to_releasing(tmp_path: Path) -> None:
    async with served(tmp_path) as stub:
        given = await allocate(stub, "web", address="10.0.0.5")
        assert given == pb.Address(
            ip="10.0.0.5",
            pool="default",
            block="10.0.0.4/30",
            node="a",
            owner=owner("web"),
            revision=given.revision,
        )
        listed = await call(stub.ListAddresses, pb.ListAddressesRequest(node="a"), deadline_s=5)
        assert list(listed.addresses) == [given]
        blocks = await call(stub.ListBlocks, pb.ListBlocksRequest(), deadline_s=5)
        assert list(blocks.blocks) == [
            pb.Block(cidr="10.0.0.4/30", pool="default", node="a", used=1, size=4)
        ]
        pools = await call(stub.ListPools, pb.ListPoolsRequest(), deadline_s=5)
        (pool,) = pools.pools
        assert (pool.name, list(pool.spec.cidrs), pool.spec.block_size) == (
            "default",
            ["10.0.0.0/29"],
            30,
        )
        assert list(pool.usage) == [pb.Usage(family=4, capacity=6, used=1, blocks=1)]
        release = pb.ReleaseRequest(node="a", owner=owner("web"))
        assert (await call(stub.Release, release, deadline_s=5)).released
        assert not (await call(stub.Release, release, deadline_s=5)).released
        listed = await call(stub.ListAddresses, pb.ListAddressesRequest(), deadline_s=5)
        assert list(listed.addresses) == []


async def test_exhaustion_reaches_the_caller_in_words(tmp_path: Path) -> None:
    async with served(tmp_path) as stub:
        addresses = {(await allocate(stub, f"w{n}")).ip for n in range(6)}
        assert len(addresses) == 6
        with pytest.raises(
            Exhausted, match=r"pool default \(10\.0\.0\.0/29\) is exhausted: 6 of 6"
        ):
            await allocate(stub, "late")


@pytest.mark.parametrize(
    ("request_", "kind", "words"),
    [
        (pb.AllocateRequest(owner=owner("w")), Invalid, "node is empty"),
        (pb.AllocateRequest(node="a"), Invalid, "namespace is empty"),
        (
            pb.AllocateRequest(node="a", owner=owner("w"), addresses=["x"]),
            Invalid,
            "not an IP address",
        ),
        (pb.AllocateRequest(node="a", owner=owner("w"), pool="blue"), NotFound, "no pool 'blue'"),
    ],
)
async def test_what_cannot_be_asked_is_refused(tmp_path: Path, request_, kind, words) -> None:
    async with served(tmp_path) as stub:
        with pytest.raises(kind, match=words):
            await call(stub.Allocate, request_, deadline_s=5)


async def test_a_wrong_pool_in_the_configuration_stops_the_process() -> None:
    config = IpamdConfig(
        listen="127.0.0.1:0",
        metrics_listen="",
        pools={"default": PoolConfig(cidrs=("10.0.0.0/28",), block_size=26)},
    )
    async with MemoryStore(SystemClock()) as store:
        with pytest.RaisesGroup(Unusable):
            await serve_with(config, store, SystemClock())
