"""Several replicas on one store: whichever is asked, the answer is of all nodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tessera_wire.policy.v1 import policy_pb2 as pb

from services.policyd.nodes import Progress
from services.policyd.replicas import REPLICA_PREFIX, decode, encode
from services.runtime.clock import SystemClock
from services.store.memory import MemoryStore
from tests.fakes import cluster_keys as keys
from tests.fakes.policy_agent import policy_agent
from tests.fakes.running_policyd import Running, running_policyd

API = 1002
DEADLINE_S = 10.0
REF = pb.PolicyRef(kind="CiliumNetworkPolicy", namespace="shop", name="api")


@pytest.fixture
async def replicas(tmp_path: Path) -> AsyncIterator[tuple[Running, Running]]:
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(MemoryStore(SystemClock()))
        folders = [tmp_path / name for name in "ab"]
        for folder in folders:
            folder.mkdir()
        a, b = [await stack.enter_async_context(running_policyd(store, f)) for f in folders]
        await a.put(
            keys.identity(API, keys.pod("api")),
            keys.node("n1"),
            keys.address("10.2.0.1", API),
        )
        yield a, b


async def eventually(policyd: Running, check: Callable[[pb.PolicyStatusResponse], bool]):
    async with asyncio.timeout(DEADLINE_S):
        while True:
            status = await policyd.admin.PolicyStatus(REF)
            if check(status):
                return status
            await asyncio.sleep(0.01)


async def test_a_replica_answers_for_nodes_of_the_other(replicas: tuple[Running, Running]) -> None:
    a, b = replicas
    async with policy_agent(a.target, "n1", API) as agent:
        applied = await b.apply(keys.allow("api", "api", "web"))
        waited = await b.wait(applied.revision)
        assert waited.done, waited
        (node,) = (await eventually(b, lambda s: s.nodes[0].stage == "realised")).nodes
        assert (node.node, node.connected, node.identities) == ("n1", True, 1)
        assert agent.view.revision >= applied.revision


async def test_a_failure_on_one_replica_is_told_by_the_other(
    replicas: tuple[Running, Running],
) -> None:
    a, b = replicas
    async with policy_agent(a.target, "n1", API, acks=False) as agent:
        applied = await a.apply(keys.allow("api", "api", "web"))
        await agent.reached(applied.revision)
        waiting = await eventually(b, lambda s: s.nodes[0].stage == "sent")
        assert "has not acknowledged" in waiting.nodes[0].reason
        agent.failures = {API: "policy_peer: 16 of 16 entries"}
        await agent.acknowledge(applied.revision)
        failed = await eventually(b, lambda s: s.nodes[0].stage == "failed")
        assert failed.nodes[0].reason == f"identity {API}: policy_peer: 16 of 16 entries"


async def test_a_node_that_moved_is_told_by_its_newest_stream(
    replicas: tuple[Running, Running],
) -> None:
    a, b = replicas
    async with policy_agent(a.target, "n1", API, stream=1) as old:
        await a.apply(keys.allow("api", "api", "web"))
        async with policy_agent(b.target, "n1", API, stream=2):
            assert "another replica" in str(await old.end())
            applied = await b.apply(keys.allow("api", "api", "db"))
            assert (await a.wait(applied.revision)).done


async def test_a_replica_that_is_gone_takes_its_report_along(tmp_path: Path) -> None:
    async with MemoryStore(SystemClock()) as store:
        async with running_policyd(store, tmp_path) as alone:
            await alone.put(keys.node("n1"))
            async with policy_agent(alone.target, "n1"):
                assert (await alone.wait(1)).done
        (left,) = (await store.list(REPLICA_PREFIX)).items
        assert left.lease, "it would stay for ever"
        folder = tmp_path / "next"
        folder.mkdir()
        async with running_policyd(store, folder) as after:
            await store.revoke(left.lease)
            async with asyncio.timeout(DEADLINE_S):
                while (await after.status()).nodes[0].connected:
                    await after.policyd.pulse.wait()


async def test_a_watched_status_tells_every_stage_and_ends_with_its_policy(
    replicas: tuple[Running, Running],
) -> None:
    a, _ = replicas
    async with policy_agent(a.target, "n1", API, acks=False) as agent:
        applied = await a.apply(keys.allow("api", "api", "web"))
        stages: list[str] = []
        async with asyncio.timeout(DEADLINE_S):
            async for status in a.admin.WatchPolicyStatus(REF):
                stages.append(status.nodes[0].stage)
                if stages[-1] == "sent" and stages.count("sent") == 1:
                    await agent.acknowledge(applied.revision)
                if stages[-1] == "realised" and stages.count("realised") == 1:
                    await a.delete(REF)
        assert stages[-1] == "realised"


progress = st.builds(
    Progress,
    stream=st.integers(0, 9),
    sent=st.integers(0, 5),
    realised=st.integers(0, 5),
    failures=st.dictionaries(st.integers(0, 5), st.sampled_from(["full", "odd"]), max_size=2),
)


@given(st.dictionaries(st.sampled_from([f"n{n}" for n in range(9)]), progress))
def test_a_report_says_of_each_node_what_it_was_told(nodes: dict[str, Progress]) -> None:
    assert decode(encode(nodes)) == nodes


def test_a_report_of_nodes_in_step_is_short() -> None:
    nodes = {f"node-{n}": Progress(1_700_000_000_000, 57, 57) for n in range(2500)}
    assert len(encode(nodes)) < 75_000
