"""A node that does nothing but give addresses to endpoints and take them back, in a process that
may be killed at any point: the agent's Addressing, its log, its records on disk.

    python -m tests.fakes.address_node '{"node": ..., "target": ..., "folder": ..., ...}'

<folder>/ledger    a line each time an endpoint was given addresses, and before it gives them up
<folder>/stage     written by the test: run, settle (delete half of them, then rest), exit
<folder>/settled   written by the node: the endpoints it has then
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path

from tessera_wire.ipam.v1.ipam_pb2_grpc import IpamServiceStub

from datapath.agent import checkpoint
from datapath.agent.addressing import Addressing, Given, owner_of
from datapath.agent.addresslog import AddressLog
from datapath.agent.checkpoint import ENDPOINTS_FILE, Journal
from datapath.agent.record import EndpointRecord, State, outer_name
from ipam.block import address_text
from services.runtime.clock import SystemClock
from services.runtime.errors import TesseraError
from services.wire.client import channel

NAMES = 120
PAUSE_S = 0.02


class Node:
    def __init__(self, options: dict) -> None:
        self.node = options["node"]
        self.folder = Path(options["folder"])
        self.concurrency = options["concurrency"]
        self.target = options["target"]
        self.random = random.Random(options["seed"])
        self.clock = SystemClock()
        self.records: dict[tuple[str, str], EndpointRecord] = {}
        journal = checkpoint.load_journal(self.folder) or Journal()
        self.next_id = journal.next_id
        self.records = {record.key: record for record in journal.endpoints}
        self.busy: set[tuple[str, str]] = set()
        self.ledger = os.open(self.folder / "ledger", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.saving = asyncio.Lock()
        self.saved = self.asked = 0

    def note(self, what: str, record: EndpointRecord) -> None:
        ips = [address_text(a) for a in (record.address, record.address6) if a]
        line = [self.clock.monotonic_s(), what, str(owner_of(record)), record.id, ips]
        os.write(self.ledger, json.dumps(line).encode() + b"\n")

    async def save(self) -> None:
        self.asked += 1
        mine = self.asked
        async with self.saving:
            if self.saved >= mine:
                return
            covers = self.asked
            packed = checkpoint.pack_journal(Journal(self.next_id, 0, tuple(self.records.values())))
            await asyncio.to_thread(checkpoint.write, self.folder / ENDPOINTS_FILE, packed)
            self.saved = covers

    def stage(self) -> str:
        return (self.folder / "stage").read_text()

    async def add(self, addressing: Addressing, name: str) -> None:
        record = EndpointRecord(
            id=self.next_id,
            namespace=f"ns-{self.node}",
            name=name,
            labels=(),
            netns="",
            interface="eth0",
            outer=outer_name(self.node, "ns", name),
            state=State.CREATING,
        )
        self.next_id += 1
        self.records[record.key] = record
        await self.save()
        try:
            given: Given = await addressing.allocate(record)
        except TesseraError:
            await self.delete(addressing, record)
            return
        made = replace(record, address=given.ipv4, address6=given.ipv6, state=State.READY)
        self.records[record.key] = made
        await self.save()
        self.note("given", made)

    async def delete(self, addressing: Addressing, record: EndpointRecord) -> None:
        if record.state is State.READY:
            self.note("released", record)
        self.records[record.key] = replace(record, state=State.RELEASING)
        await self.save()
        try:
            await addressing.release(record)
        except TesseraError:
            return  # it stays RELEASING, and is tried again
        del self.records[record.key]
        await self.save()

    async def work(self, addressing: Addressing) -> None:
        while self.stage() == "run":
            name = f"w{self.random.randrange(NAMES)}"
            key = (f"ns-{self.node}", name)
            if key not in self.busy:
                self.busy.add(key)
                try:
                    known = self.records.get(key)
                    if known is None:
                        await self.add(addressing, name)
                    else:
                        await self.delete(addressing, known)
                finally:
                    self.busy.discard(key)
            await asyncio.sleep(PAUSE_S)

    async def settle(self, addressing: Addressing) -> None:
        """Half of the endpoints go, and everything that has yet to be given back."""
        going = [r for r in self.records.values() if r.state is not State.READY]
        ready = [r for r in self.records.values() if r.state is State.READY]
        going += ready[::2]
        while going:
            for record in going:
                await self.delete(addressing, self.records[record.key])
            going = [r for r in going if r.key in self.records]
            await asyncio.sleep(PAUSE_S)
        # Releasing what is released changes nothing.
        for record in ready[::2]:
            await addressing.release(record)
        left = [
            {"owner": str(owner_of(r)), "ips": [r.address, r.address6], "record": asdict(r)["id"]}
            for r in self.records.values()
        ]
        (self.folder / "settled.tmp").write_text(json.dumps(left))
        (self.folder / "settled.tmp").rename(self.folder / "settled")

    async def run(self) -> None:
        log = AddressLog(self.folder)
        async with channel(self.target) as to_ipamd:
            addressing = Addressing(
                IpamServiceStub(to_ipamd),
                self.node,
                journal=log,
                records=lambda: self.records.values(),
                networks=tuple,
                clock=self.clock,
            )
            # What a killed run left half made, as the agent does it.
            await addressing.settle()
            async with asyncio.TaskGroup() as group:
                running = group.create_task(addressing.run())
                for record in tuple(self.records.values()):
                    if record.state is not State.READY:
                        await self.delete(addressing, record)
                async with asyncio.TaskGroup() as workers:
                    for _ in range(self.concurrency):
                        workers.create_task(self.work(addressing))
                await self.settle(addressing)
                while self.stage() != "exit":  # noqa: ASYNC110 - a file says it
                    await asyncio.sleep(0.05)
                running.cancel()
        log.close()


if __name__ == "__main__":
    asyncio.run(Node(json.loads(sys.argv[1])).run())
