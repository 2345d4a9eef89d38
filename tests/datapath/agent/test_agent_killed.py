"""The agent as a process that dies without warning."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest
from pyroaring import BitMap

from datapath import links
from datapath.maps.tables import Tables
from services.policy.clauses import Action, Clause, Direction, LocalPolicy, PolicyRef, PortRange
from services.runtime.config import AgentConfig
from tests.fakes.control_plane import ControlPlane, control_plane
from tests.fakes.kernel_node import built_object, needs_kernel
from tests.fakes.netns import Namespace, namespace
from tests.fakes.node_agent import RunningAgent, config_for, unpin, until

pytestmark = pytest.mark.kernel

WEB = PolicyRef("CiliumNetworkPolicy", "shop", "web")


def write_config(config: AgentConfig, path: Path) -> None:
    keys = msgspec.to_builtins(config)
    lines = [f"{key} = {spelled(keys[key])}" for key in keys if key not in ("log", "telemetry")]
    path.write_text("[agent]\n" + "\n".join(lines) + "\n")


def spelled(value: object) -> str:
    return msgspec.json.encode(value).decode()


@asynccontextmanager
async def process(config: AgentConfig, file: Path) -> AsyncIterator[RunningAgent]:
    """Killed at the end."""
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "datapath.agent.main", "--config", str(file),
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    path = Path(config.run_dir) / "agent.sock"
    connector = aiohttp.UnixConnector(str(path))
    try:
        async with aiohttp.ClientSession(connector=connector) as http:
            node = RunningAgent(config, http)
            await answers(node)
            yield node
    finally:
        started.send_signal(signal.SIGKILL)
        await started.wait()


async def answers(node: RunningAgent) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                await node.get("/v1/status")
            except aiohttp.ClientError:
                await asyncio.sleep(0.01)
            else:
                return


async def add(node: RunningAgent, ns: Namespace, name: str) -> dict:
    status, body = await node.post(
        namespace="shop", name=name, netns=ns.path, labels=[f"k8s:app={name}"]
    )
    assert status == 201, body
    return body


async def set_policy(plane: ControlPlane, identity: int, allowed: BitMap) -> None:
    clause = Clause(Direction.INGRESS, (7,), (PortRange(6, 80, 80),), Action.ALLOW, 16)
    plane.policies.set_group(7, allowed)
    policy = LocalPolicy(identity, True, False, (clause,), (WEB,), ())
    revision = plane.policies.set_policy(policy)
    acks = plane.policies.acks
    await until(lambda: bool(acks) and acks[-1].revision >= revision)


async def test_a_killed_agent_leaves_its_policy_in_force_and_the_next_one_takes_over(
    tmp_path: Path,
) -> None:
    needs_kernel()
    built_object()
    file = tmp_path / "agent.toml"
    with namespace("tsr-agent") as client, namespace("tsr-agent") as server:
        async with control_plane() as plane:
            config = config_for(tmp_path, plane.target)
            write_config(config, file)
            try:
                async with process(config, file) as node:
                    a, b = await add(node, client, "client"), await add(node, server, "web")
                    # Killed before the view's checkpoint is due: it says nothing of this policy.
                    await set_policy(plane, b["identity"], BitMap([a["identity"]]))
                with server.listen(80):
                    assert await asyncio.to_thread(client.can_connect, b["ip"], 80)
                    plane.identities.away = True
                    plane.policies.withheld = True
                    async with process(config, file) as node:
                        tables = Tables.pinned(Path(config.bpf_dir))
                        slots = {row.identity: row.slot_in for _, row in tables.endpoints.items()}
                        tables.close()
                        assert slots[b["identity"]] != 0
                        assert await asyncio.to_thread(client.can_connect, b["ip"], 80)
                        assert not await asyncio.to_thread(client.can_connect, b["ip"], 81)
                        plane.identities.away = False
                        for made in (a, b):
                            status, _ = await node.delete(str(made["id"]))
                            assert status == 200
                        await until(lambda: not plane.addresses.owners)
                assert not set(links.list_outer("tes")) & {a["interface"], b["interface"]}
            finally:
                unpin(config)
