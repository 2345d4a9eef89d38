"""The streams of agents over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio
import pytest
from tessera_wire.policy.v1 import policy_pb2_grpc
from tessera_wire.policy.v1.policy_pb2 import AgentMessage, Hello, Interest, Update

from services.runtime.clock import SystemClock
from services.runtime.errors import Invalid
from services.runtime.tracing import span
from services.store.memory import MemoryStore
from services.wire.client import channel, translate
from tests.fakes import cluster_keys as keys
from tests.fakes.policy_agent import policy_agent
from tests.fakes.running_policyd import Running, running_policyd

WEB, API = 1001, 1002
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
WEB_KEY = keys.identity(WEB, keys.pod("web"))
API_KEY = keys.identity(API, keys.pod("api"))


@pytest.fixture
async def policyd(tmp_path: Path) -> AsyncIterator[Running]:
    async with (
        MemoryStore(SystemClock()) as store,
        running_policyd(store, tmp_path) as running,
    ):
        yield running


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nothing announces what is polled for
            await asyncio.sleep(0.01)


async def test_a_policy_reaches_a_connected_agent(policyd: Running) -> None:
    await policyd.put(WEB_KEY, API_KEY)
    async with policy_agent(policyd.target, "n1", API) as agent:
        applied = await policyd.apply(keys.allow("api", "api", "web"))
        view = await agent.reached(applied.revision)
        assert view.held.locals[API].ingress_enforced
        assert [list(members) for members in view.held.groups.values()] == [[WEB]]
        assert view.snapshots == 1


async def test_an_address_waits_for_its_identity(policyd: Running) -> None:
    async with policy_agent(policyd.target, "n1") as agent:
        view = await agent.reached(await policyd.put(keys.address("10.2.0.1", WEB)))
        assert view.held.addresses == {}
        view = await agent.reached(await policyd.put(WEB_KEY))
        assert view.held.addresses == {"10.2.0.1": (WEB, "192.0.2.1", "shop", "p")}


async def test_interest_is_answered_at_once(policyd: Running) -> None:
    await policyd.put(WEB_KEY, API_KEY)
    await policyd.apply(keys.allow("api", "api", "web"))
    async with policy_agent(policyd.target, "n1") as agent:
        await agent.follow(add=(API,))
        view = await agent.until(lambda view: API in view.held.locals)
        assert len(view.held.groups) == 1
        await agent.follow(remove=(API,))
        view = await agent.until(lambda view: API not in view.held.locals)
        assert view.held.groups == {}


async def test_a_restarted_policyd_says_the_same_again(tmp_path: Path) -> None:
    async with MemoryStore(SystemClock()) as store:
        async with running_policyd(store, tmp_path) as policyd:
            await policyd.put(WEB_KEY, API_KEY, keys.node("n1"))
            await policyd.put(keys.address("10.2.0.1", WEB))
            await policyd.apply(keys.allow("api", "api", "web"))
            applied = await policyd.apply(keys.to_cidr("out", "api", "10.0.0.0/8"))
            async with policy_agent(policyd.target, "n1", API) as agent:
                before = (await agent.reached(applied.revision)).held
        async with (
            running_policyd(store, tmp_path) as policyd,
            policy_agent(policyd.target, "n1", API) as agent,
        ):
            assert (await agent.reached(applied.revision)).held == before


async def test_a_stopping_policyd_tells_its_agents(tmp_path: Path) -> None:
    async with MemoryStore(SystemClock()) as store, AsyncExitStack() as stopping:
        policyd = await stopping.enter_async_context(running_policyd(store, tmp_path))
        async with policy_agent(policyd.target, "n1") as agent:
            await stopping.aclose()
            assert "stopping" in str(await agent.end())


async def test_a_second_stream_of_a_node_ends_the_first(policyd: Running) -> None:
    async with (
        policy_agent(policyd.target, "n1") as old,
        policy_agent(policyd.target, "n1") as new,
    ):
        assert "another stream" in str(await old.end())
        await new.reached(await policyd.put(WEB_KEY))
    await eventually(lambda: not policyd.policyd.distributor.subscriptions)


async def test_a_compacted_watch_costs_no_snapshot(policyd: Running) -> None:
    await policyd.put(WEB_KEY, API_KEY)
    async with policy_agent(policyd.target, "n1", API) as agent:
        policyd.store.compact()
        policyd.store.break_watches()
        applied = await policyd.apply(keys.allow("api", "api", "web"))
        view = await agent.reached(applied.revision)
        assert view.snapshots == 1
        assert API in view.held.locals


async def test_the_trace_of_the_request_arrives_with_the_update(policyd: Running) -> None:
    await policyd.put(API_KEY)
    async with policy_agent(policyd.target, "n1", API) as agent:
        with span("test", traceparent=f"00-{TRACE_ID}-b7ad6b7169203331-01"):
            applied = await policyd.apply(keys.allow("api", "api", "web"))
        view = await agent.reached(applied.revision)
    assert [each.split("-")[1] for each in view.traceparents] == [TRACE_ID]


@pytest.mark.parametrize(
    "first",
    [
        AgentMessage(interest=Interest(add=[1])),
        AgentMessage(hello=Hello()),
        AgentMessage(),
    ],
)
async def test_a_stream_that_does_not_say_who_it_is_is_refused(
    policyd: Running, first: AgentMessage
) -> None:
    async with channel(policyd.target) as dialled:
        stream = policy_pb2_grpc.PolicyDistributionStub(dialled).Subscribe()
        await stream.write(first)
        with pytest.raises(Invalid, match="Hello"):
            await _drain(stream)


async def test_a_second_hello_is_refused(policyd: Running) -> None:
    async with channel(policyd.target) as dialled:
        stream = policy_pb2_grpc.PolicyDistributionStub(dialled).Subscribe()
        hello = AgentMessage(hello=Hello(node="n1"))
        await stream.write(hello)
        await stream.write(hello)
        with pytest.raises(Invalid, match="Hello is the first message"):
            await _drain(stream)


async def test_a_reader_that_stalls_is_not_queued_for(policyd: Running) -> None:
    """The client stops reading; what it missed arrives as few Updates, not as many."""
    async with channel(policyd.target) as dialled:
        stream = policy_pb2_grpc.PolicyDistributionStub(dialled).Subscribe()
        await stream.write(AgentMessage(hello=Hello(node="slow")))
        await policyd.put(WEB_KEY)
        rounds = 200
        long_name = "x" * 2000
        for number in range(rounds):
            ips = [f"10.{number}.{n // 250}.{n % 250}" for n in range(40)]
            revision = await policyd.put(*(keys.address(ip, WEB, name=long_name) for ip in ips))
        received = 0
        async with asyncio.timeout(30):
            async for update in stream:
                received += 1
                if update.revision >= revision and not update.more:
                    break
    assert received < rounds / 2


async def _drain(stream: grpc.aio.StreamStreamCall[AgentMessage, Update]) -> None:
    try:
        async for _ in stream:
            pass
    except grpc.aio.AioRpcError as error:
        raise translate(error, "policyd") from error
