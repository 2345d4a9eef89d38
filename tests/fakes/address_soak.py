"""Address service, store and nodes as processes, and what may happen to them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

from services.runtime.clock import SystemClock
from services.runtime.etcd_process import EmbeddedEtcd
from tests.fakes import address_checker

POOL = """
[etcd]
endpoints = ["{endpoint}"]
request_timeout_s = 2.0
[log]
level = "warning"
[ipamd]
listen = "unix://{folder}/ipamd-{number}.sock"
metrics_listen = ""
release_cooldown_s = 2
node_gone_s = 30
[ipamd.pools.default]
cidrs = ["10.20.0.0/22", "fd20::/64"]
block_size = 27
"""
DEADLINE_S = 60.0


@dataclass
class Soak:
    """`concurrency`: of all nodes together."""

    folder: Path
    etcd: EmbeddedEtcd
    seed: int
    concurrency: int = 50
    nodes: int = 4
    replicas: int = 2
    running: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    dead: dict[str, float] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    # -------------------------------------------------------------- processes

    async def start(self) -> None:
        for number in range(self.replicas):
            await self.start_replica(number)
        for number in range(self.nodes):
            place = self.place(f"n{number}")
            place.mkdir()
            (place / "stage").write_text("run")
            await self.start_node(f"n{number}")
        for number in range(self.nodes):
            ledger = self.place(f"n{number}") / "ledger"
            await self.until(lambda file=ledger: file.exists() and file.stat().st_size, "work")

    def place(self, node: str) -> Path:
        return self.folder / node

    async def start_replica(self, number: int) -> None:
        config = self.folder / f"ipamd-{number}.toml"
        config.write_text(
            POOL.format(endpoint=self.etcd.endpoint, folder=self.folder, number=number)
        )
        await self._spawn(f"ipamd-{number}", "-m", "services.ipamd.main", "--config", str(config))

    async def start_node(self, node: str) -> None:
        number = int(node[1:])
        options = {
            "node": node,
            "target": f"unix://{self.folder}/ipamd-{number % self.replicas}.sock",
            "folder": str(self.place(node)),
            "concurrency": self.concurrency // self.nodes,
            "seed": self.random.random(),
        }
        await self._spawn(node, "-m", "tests.fakes.address_node", json.dumps(options))

    async def _spawn(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as output:
            self.running[name] = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stdout=output, stderr=output
            )

    async def kill(self, name: str) -> None:
        process = self.running.pop(name)
        assert process.returncode is None, f"{name} ended by itself: {self.last_words(name)}"
        process.kill()
        await process.wait()

    def last_words(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-2000:]

    # -------------------------------------------------------------- what happens

    async def misfortune(self) -> None:
        what = self.random.choice(["node", "node", "node", "replica", "store", "lull"])
        living = [f"n{n}" for n in range(self.nodes) if f"n{n}" not in self.dead]
        if what == "node":
            node = self.random.choice(living)
            await self.kill(node)
            await self._while(0.0, 0.6)
            await self.start_node(node)
        elif what == "replica":
            number = self.random.randrange(self.replicas)
            await self.kill(f"ipamd-{number}")
            await self._while(0.0, 1.5)
            await self.start_replica(number)
        elif what == "store":
            assert self.etcd.pid is not None
            os.kill(self.etcd.pid, signal.SIGSTOP)
            try:
                await self._while(0.5, 3.0)
            finally:
                os.kill(self.etcd.pid, signal.SIGCONT)
        self.done.append(what)
        await self._while(0.2, 2.5)

    async def _while(self, low_s: float, high_s: float) -> None:
        await asyncio.sleep(self.random.uniform(low_s, high_s))

    async def lose_for_good(self, node: str) -> None:
        await self.kill(node)
        self.dead[node] = SystemClock().monotonic_s()

    async def settle(self) -> dict[str, set[str]]:
        """owner -> addresses, of the endpoints that the living nodes have when all is quiet."""
        living = [f"n{n}" for n in range(self.nodes) if f"n{n}" not in self.dead]
        for node in living:
            (self.place(node) / "stage").write_text("settle")
        left: dict[str, set[str]] = {}
        for node in living:
            file = self.place(node) / "settled"
            await self.until(file.exists, f"{node} to settle", node)
            for one in json.loads(file.read_text()):
                left[one["owner"]] = {address_checker.address_text(ip) for ip in one["ips"] if ip}
        return left

    async def until(self, true, what: str, *whose: str) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not true():
                    for name in whose:
                        assert self.running[name].returncode is None, self.last_words(name)
                    await asyncio.sleep(0.05)
        except TimeoutError:
            words = "\n".join(f"{name}: {self.last_words(name)}" for name in whose)
            raise AssertionError(f"waited for {what} in vain\n{words}") from None

    async def stop(self) -> None:
        for node in tuple(self.running):
            if node.startswith("n") and self.place(node).exists():
                (self.place(node) / "stage").write_text("exit")
        for process in self.running.values():
            if process.returncode is None:
                process.terminate()
        for process in self.running.values():
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    def ledgers(self) -> dict[str, list[address_checker.Line]]:
        return {
            f"n{n}": address_checker.read(self.place(f"n{n}") / "ledger") for n in range(self.nodes)
        }
