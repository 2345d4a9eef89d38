"""A whole agent in this process: real programs, maps, interfaces and socket."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from datapath.agent.main import agent
from datapath.maps.tables import Tables
from services.runtime.config import AgentConfig

_counter = itertools.count()
DEADLINE_S = 10.0


async def until(condition: Callable[[], bool], what: str = "condition") -> None:
    """Polls; the deadline is for broken code, not for slow machines."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  the condition is a table or a file
            await asyncio.sleep(0.005)
    assert condition(), what


class RunningAgent:
    def __init__(self, config: AgentConfig, http: aiohttp.ClientSession) -> None:
        self.config = config
        self.http = http

    @property
    def tables(self) -> Tables:
        return Tables.pinned(Path(self.config.bpf_dir))

    async def get(self, path: str):
        async with self.http.get(f"http://agent{path}") as response:
            return response.status, await response.json(content_type=None)

    async def post(self, **body):
        async with self.http.post("http://agent/v1/endpoints", json=body) as response:
            return response.status, await response.json(content_type=None)

    async def delete(self, ref: str):
        async with self.http.delete(f"http://agent/v1/endpoints/{ref}") as response:
            return response.status, await response.json(content_type=None)

    async def flows(self, query: str = "") -> list[dict]:
        import json

        async with self.http.get(f"http://agent/v1/events{query}") as response:
            return [json.loads(line) for line in (await response.read()).splitlines()]


def config_for(state: Path, target: str, **changes) -> AgentConfig:
    return AgentConfig(
        **{
            "node_name": "n1",
            "node_ip": "192.0.2.1",
            "state_dir": str(state / "state"),
            "run_dir": str(state / "run"),
            "bpf_dir": f"/sys/fs/bpf/tsr-agent-{os.getpid()}-{next(_counter)}",
            "identityd": target,
            "ipamd": target,
            "policyd": target,
            "metrics_listen": "",
            "policy_peer_max": 65536,
            **changes,
        }
    )


@asynccontextmanager
async def running(config: AgentConfig) -> AsyncIterator[RunningAgent]:
    """Stops at the end; what it pinned stays, for the next one, until `unpin`."""
    path = Path(config.run_dir) / "agent.sock"
    async with asyncio.TaskGroup() as group:
        task = group.create_task(agent(config))
        async with asyncio.timeout(DEADLINE_S):
            while not path.exists() and not task.done():  # noqa: ASYNC110  a socket appears
                await asyncio.sleep(0.005)
        if task.done():
            task.result()
        connector = aiohttp.UnixConnector(str(path))
        async with aiohttp.ClientSession(connector=connector) as http:
            yield RunningAgent(config, http)
        task.cancel()


def unpin(config: AgentConfig) -> None:
    shutil.rmtree(config.bpf_dir, ignore_errors=True)
