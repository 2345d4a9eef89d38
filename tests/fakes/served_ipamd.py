"""ipamd in this process, over gRPC, on a memory store that outlives it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from services.ipamd.main import serve_with
from services.runtime.clock import SystemClock
from services.runtime.config import IpamdConfig, PoolConfig
from services.store.memory import MemoryStore

POOLS = {"default": PoolConfig(cidrs=("10.0.0.0/24", "fd00::/64"), block_size=28)}


@dataclass
class Service:
    """ipamd, which can be stopped and started; its store stays."""

    folder: Path
    store: MemoryStore
    config: IpamdConfig
    tasks: asyncio.TaskGroup
    running: asyncio.Task[None] | None = None

    @property
    def target(self) -> str:
        return self.config.listen

    async def start(self) -> None:
        listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        serving = serve_with(self.config, self.store, SystemClock(), listening)
        self.running = self.tasks.create_task(serving)
        async with asyncio.timeout(20):
            await listening

    async def stop(self) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.wait([self.running])
            self.running = None


@asynccontextmanager
async def service(folder: Path, pools: dict[str, PoolConfig] | None = None):
    config = IpamdConfig(
        listen=f"unix://{folder}/ipamd.sock",
        metrics_listen="",
        pools=pools or POOLS,
        release_cooldown_s=0,
    )
    async with MemoryStore(SystemClock()) as store, asyncio.TaskGroup() as tasks:
        made = Service(folder, store, config, tasks)
        await made.start()
        try:
            yield made
        finally:
            await made.stop()
