"""Nodes that come, allocate, release, hang and die; what tells of it; and what disturbs identityd.

Recorder ── raw watch ──► every event of etcd, unconflated
Nodes ── gRPC, whichever replica answers ──► journal of answers
Replicas ── processes: killed, stopped, started again
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
from tessera_wire.etcd import etcd_pb2 as etcd
from tessera_wire.etcd import etcd_pb2_grpc, kv_pb2
from tessera_wire.identity.v1 import identity_pb2 as pb
from tessera_wire.identity.v1.identity_pb2_grpc import IdentityServiceStub

from services.runtime.errors import NotFound, TesseraError
from services.wire.client import call, channel
from tests.fakes.identity_history import WATCHED, Answer, Event

CALL_S = 3.0


def now_s() -> float:
    return time.monotonic()  # noqa: TID251 - what is recorded is real time


# ------------------------------------------------------------------ etcd's side


class Recorder:
    """From the first revision on, until `close`. `failed`: the history has a hole."""

    def __init__(self, endpoint: str) -> None:
        self._channel = grpc.aio.insecure_channel(
            endpoint, options=[("grpc.max_receive_message_length", -1)]
        )
        self._kv = etcd_pb2_grpc.KVStub(self._channel)
        self._watch = etcd_pb2_grpc.WatchStub(self._channel)
        self.events: list[Event] = []
        self.revision = 0
        self._compacted = 0
        self.failed = ""

    async def run(self) -> None:
        stream = self._watch.Watch()
        created = etcd.WatchCreateRequest(
            key=b"cilium/", range_end=b"tessera0", start_revision=1, progress_notify=True
        )
        await stream.write(etcd.WatchRequest(create_request=created))
        while True:
            response = await stream.read()
            if response is grpc.aio.EOF or response.canceled:
                self.failed = f"the watch ended: {response}"
                return
            at_s = now_s()
            self.events += [
                _event(each, at_s) for each in response.events if _key(each).startswith(WATCHED)
            ]
            self.revision = max(self.revision, response.header.revision)

    async def caught_up(self) -> None:
        """Everything that has happened by now is recorded."""
        await self._kv.Put(etcd.PutRequest(key=b"tessera/test/mark", value=b""))
        head = await self._kv.Range(etcd.RangeRequest(key=b"tessera/test/mark"))
        async with asyncio.timeout(90):
            while self.revision < head.header.revision and not self.failed:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def compact(self) -> None:
        """Forgets all but what the recorder has not seen yet."""
        if self.revision > self._compacted:
            self._compacted = self.revision
            request = etcd.CompactionRequest(revision=self._compacted, physical=True)
            await self._kv.Compact(request)

    async def close(self) -> None:
        await self._channel.close()


def _key(event: kv_pb2.Event) -> str:
    return event.kv.key.decode()


def _event(event: kv_pb2.Event, at_s: float) -> Event:
    removed = event.type == kv_pb2.Event.DELETE
    value = None if removed else event.kv.value.decode()
    return Event(event.kv.mod_revision, _key(event), value, at_s, event.kv.lease)


# ------------------------------------------------------------------ replicas


class Replica:
    """identityd as its users run it."""

    def __init__(self, folder: Path, name: str, etcd_endpoint: str, settings: str) -> None:
        self.target = f"unix://{folder}/{name}.sock"
        self._config = folder / f"{name}.toml"
        self._log = folder / f"{name}.log"
        self._config.write_text(
            f'[etcd]\nendpoints = ["{etcd_endpoint}"]\n'
            f'[identityd]\nlisten = "{self.target}"\nmetrics_listen = ""\n{settings}'
        )
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "services.identityd.main",
                "--config",
                str(self._config),
                stdout=log,
                stderr=log,
            )

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")


# ------------------------------------------------------------------ nodes


@dataclass(slots=True)
class _Held:
    number: int
    asked_s: float
    told_s: float


@dataclass(slots=True)
class Journal:
    answers: list[Answer] = field(default_factory=list)
    remapped: int = 0
    lost_leases: int = 0
    away: int = 0


class Node:
    """Does what an agent does, with less patience. `ttl_s`: of its session."""

    def __init__(
        self,
        name: str,
        stubs: Sequence[IdentityServiceStub],
        journal: Journal,
        chooser: random.Random,
        sets: Sequence[str],
        ttl_s: int,
    ) -> None:
        self._name, self._stubs, self._journal = name, stubs, journal
        self._chooser, self._sets, self._ttl_s = chooser, sets, ttl_s
        self._at = chooser.randrange(len(stubs))
        self._lease = 0
        self._kept_s = 0.0
        self._held: dict[str, _Held] = {}
        # What the node believes to have, to be adopted after a lost lease.
        self._numbers: dict[str, int] = {}

    async def live(self, until_s: float) -> None:
        while now_s() < until_s:
            try:
                await self._step()
            except NotFound:
                self._journal.lost_leases += 1
                self._lose()
            except TesseraError:
                self._journal.away += 1
                self._at = (self._at + 1) % len(self._stubs)
                await asyncio.sleep(0.1)
            # So that a set is unused for about as long as it takes to be collected: then the two
            # meet most often.
            await asyncio.sleep(self._chooser.uniform(0.05, 0.25))

    async def leave(self) -> None:
        """Gives everything back, however long that takes."""
        self._settle(now_s())
        for _ in range(300):
            try:
                request = pb.CloseSessionRequest(node=self._name, lease=self._lease)
                if self._lease:
                    await self._ask("CloseSession", request)
            except TesseraError:
                self._at = (self._at + 1) % len(self._stubs)
                await asyncio.sleep(0.2)
            else:
                return
        raise AssertionError(f"{self._name} cannot leave")

    async def _step(self) -> None:
        if not self._lease:
            return await self._open()
        if now_s() - self._kept_s > self._ttl_s / 4:
            await self._keep()
        match self._chooser.randrange(20):
            case 0:
                # Hangs beyond its lease, and goes on as if nothing had happened.
                if self._chooser.random() < 0.3:
                    await asyncio.sleep(self._ttl_s * 1.5)
            case 1:
                await self._restart()
            case n if n < 13:
                await self._release()
            case _:
                await self._allocate(self._some(self._sets))
        return None

    async def _open(self) -> None:
        request = pb.OpenSessionRequest(node=self._name, ttl_s=self._ttl_s, internal_ip="192.0.2.1")
        asked_s = now_s()
        session = await self._ask("OpenSession", request)
        self._lease, self._kept_s = session.lease, asked_s
        if self._numbers:
            await self._allocate(list(self._numbers))

    async def _keep(self) -> None:
        asked_s = now_s()
        kept = await self._ask("KeepAlive", pb.KeepAliveRequest(lease=self._lease))
        if kept.ttl_s == 0:
            raise NotFound("the lease is gone")
        self._kept_s = asked_s

    async def _allocate(self, labels: Sequence[str]) -> None:
        items = [
            pb.AllocateItem(labels=pb.LabelSet(labels=[each]), previous=self._numbers.get(each, 0))
            for each in labels
        ]
        request = pb.AllocateRequest(node=self._name, lease=self._lease, items=items)
        asked_s = now_s()
        answer = await self._ask("Allocate", request)
        told_s = now_s()
        for each, result in zip(labels, answer.results, strict=True):
            if not result.identity:
                continue
            self._journal.remapped += result.remapped
            canonical = _canonical(result.labels.labels)
            if canonical not in self._held:
                self._held[canonical] = _Held(result.identity, asked_s, told_s)
            self._numbers[each] = result.identity

    async def _release(self) -> None:
        texts = self._some(list(self._numbers))
        numbers = {self._numbers[each] for each in texts}
        if not numbers:
            return
        self._settle(now_s(), numbers)
        for each in texts:
            del self._numbers[each]
        request = pb.ReleaseRequest(node=self._name, identities=sorted(numbers))
        await self._ask("Release", request)

    async def _restart(self) -> None:
        """Loses what it knew but the numbers, and its session with it."""
        self._lose()

    def _lose(self) -> None:
        self._settle(self._kept_s)
        self._lease = 0

    def _settle(self, until_s: float, numbers: set[int] | None = None) -> None:
        """What was relied on is so no more: released, or the lease may be gone."""
        for labels, held in tuple(self._held.items()):
            if numbers is None or held.number in numbers:
                del self._held[labels]
                end_s = min(until_s, max(self._kept_s, held.told_s))
                self._journal.answers.append(
                    Answer(self._name, labels, held.number, held.asked_s, held.told_s, end_s)
                )

    def _some(self, of: Sequence[str]) -> list[str]:
        return self._chooser.sample(of, min(len(of), self._chooser.randint(1, 6)))

    async def _ask(self, method: str, request: object) -> object:
        return await call(getattr(self._stubs[self._at], method), request, deadline_s=CALL_S)


async def until_it_answers(stub: IdentityServiceStub) -> None:
    """For a replica that is just starting, on a machine that has other work."""
    async with asyncio.timeout(120):
        while True:
            try:
                await call(stub.GetLabelRules, pb.GetLabelRulesRequest(), deadline_s=CALL_S)
            except TesseraError:
                await asyncio.sleep(0.2)
            else:
                return


def _canonical(labels: Sequence[str]) -> str:
    return "".join(f"{label};" if "=" in label else f"{label}=;" for label in labels)


@asynccontextmanager
async def stubs_of(replicas: Sequence[Replica]) -> AsyncIterator[list[IdentityServiceStub]]:
    async with (
        channel(replicas[0].target) as one,
        channel(replicas[1].target) as two,
        channel(replicas[-1].target) as three,
    ):
        yield [IdentityServiceStub(each) for each in (one, two, three)]
