"""The agent's subscription and policyd's distribution, joined by a line that a test breaks.

    History --batch--> Replica (State, Distributor) --Update--> Line --Update--> Subscription
                                                     cut, repeat, lose, alter     Enforcement
                                                                                  tables in memory

Both ends are the real ones; what is not here is gRPC and time.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum

from tessera_wire.policy.v1.policy_pb2 import AgentMessage, Update

from datapath.agent import checkpoint
from datapath.agent.enforcement import Enforcement, Realised
from datapath.agent.subscribe import Door, Subscription
from datapath.agent.view import View
from datapath.maps.layout import Endpoint, EndpointFlags
from datapath.maps.tables import Tables
from datapath.reconcile import read
from identity.numbers import NumericIdentity
from services.policy.resolve import Resolver, ResolverSettings
from services.policyd.distribute import Distributor
from services.policyd.state import State
from services.policyd.subscriber import Subscription as Outlet
from services.runtime.errors import Retry
from services.store.model import Changed, KeyValue, Removed, Revision, Synced, WatchEvent
from services.wire.held import held_from_wire

Step = tuple[str, bytes | None]
INSTANCE = "one store"
DEADLINE_S = 20.0


class Fault(Enum):
    CUT = "the stream ends instead of the message"
    CUT_AFTER = "the stream ends after the message"
    REPEATED = "the message comes twice"
    LOST = "the message does not come"
    ALTERED = "the message names another identity for an address, or another group member"
    REPLACED = "policyd dies; another lists the store anew"
    RESTARTED = "the agent is killed and begins from an old checkpoint"


class History:
    """What the store held, by revision: every replica sees the same revisions."""

    def __init__(self) -> None:
        self.revision = 0
        self.content: dict[str, tuple[bytes, int]] = {}

    def add(self, batch: Iterable[Step]) -> list[WatchEvent]:
        events: list[WatchEvent] = []
        for key, value in batch:
            self.revision += 1
            revision = Revision(self.revision)
            if value is None:
                self.content.pop(key, None)
                events.append(Removed(key, revision))
            else:
                self.content[key] = (value, self.revision)
                events.append(Changed(KeyValue(key, value, revision, revision, 1)))
        return events

    def listing(self) -> list[WatchEvent]:
        items: list[WatchEvent] = [
            Changed(KeyValue(key, value, Revision(revision), Revision(revision), 1))
            for key, (value, revision) in sorted(self.content.items())
        ]
        return [*items, Synced(Revision(self.revision))]


class Replica:
    def __init__(self, history: History, *, log_keys: int = 200_000, message_bytes: int) -> None:
        self.state = State(Resolver(ResolverSettings(allow_localhost=False)))
        self.distributor = Distributor(self.state, log_keys=log_keys, message_bytes=message_bytes)
        self.distributor.publish(self.state.apply(history.listing()))
        self.distributor.listed(INSTANCE)

    def feed(self, events: Sequence[WatchEvent]) -> None:
        self.distributor.publish(self.state.apply(events))
        # The pause between two rounds of wake-ups is for machines that are busy.
        for outlet in tuple(self.distributor.subscriptions):
            outlet.wake()


class Line:
    """Stands where the agent has its stub. `fault` happens at the `at`th message, once."""

    def __init__(self, replica: Callable[[], Replica]) -> None:
        self._replica = replica
        self.fault: Fault | None = None
        self.at = 0
        self.messages = 0
        self.acked = 0
        self.on_fault: Callable[[Fault], None] = lambda fault: None
        self.streams: list[Stream] = []

    def Subscribe(self, *, metadata: object) -> Stream:
        stream = Stream(self, self._replica().distributor)
        self.streams.append(stream)
        return stream

    def strikes(self) -> Fault | None:
        self.messages += 1
        if self.fault is None or self.messages - 1 != self.at:
            return None
        struck, self.fault = self.fault, None
        return struck


class Stream:
    def __init__(self, line: Line, distributor: Distributor) -> None:
        self._line = line
        self._distributor = distributor
        self._outlet: Outlet | None = None
        self._ready: deque[bytes] = deque()
        self._repeat: bytes | None = None
        self._ended = False
        self._closed = False

    async def write(self, message: AgentMessage) -> None:
        match message.WhichOneof("kind"):
            case "hello":
                hello = message.hello
                identities = [NumericIdentity(i) for i in hello.identities]
                held = held_from_wire(hello.held)
                with self._distributor.subscribed(hello.node, identities, held) as outlet:
                    self._outlet = outlet
                self._distributor.subscriptions.add(outlet)
            case "interest":
                assert self._outlet is not None
                self._outlet.follow(
                    [NumericIdentity(i) for i in message.interest.add],
                    [NumericIdentity(i) for i in message.interest.remove],
                )
            case "held":
                assert self._outlet is not None
                self._outlet.lost(held_from_wire(message.held))
            case "ack":
                self._line.acked = message.ack.revision

    async def read(self) -> Update:
        assert self._outlet is not None
        if self._ended:
            raise Retry("the stream was cut")
        while not self._ready:
            await self._outlet.woken()
            if self._ended:
                raise Retry("the stream was cut")
            self._ready.extend(self._outlet.take())
        message = self._ready.popleft()
        struck = self._line.strikes()
        if struck is not None:
            return await self._struck(struck, message)
        return Update.FromString(message)

    async def _struck(self, fault: Fault, message: bytes) -> Update:
        match fault:
            case Fault.CUT | Fault.REPLACED:
                self.end()
                self._line.on_fault(fault)
                raise Retry("the stream was cut")
            case Fault.CUT_AFTER:
                self.end()
            case Fault.REPEATED:
                self._ready.appendleft(message)
            case Fault.LOST:
                self._line.on_fault(fault)
                return await self.read()
            case Fault.ALTERED:
                return altered(Update.FromString(message))
            case Fault.RESTARTED:
                self._line.on_fault(fault)
                await asyncio.Event().wait()  # the agent that reads is killed meanwhile
        return Update.FromString(message)

    def end(self) -> None:
        self._ended = True
        if self._outlet is not None:
            self._outlet.wake()

    def cancel(self) -> None:
        self.end()
        if self._outlet is not None:
            self._distributor.subscriptions.discard(self._outlet)


def altered(update: Update) -> Update:
    for address in update.addresses:
        address.identity = 9999
    for group in update.groups:
        group.identities = (4242).to_bytes(4, "little")
    for delta in update.group_deltas:
        delta.added = (4242).to_bytes(4, "little")
    return update


class NoWait:
    """Sleeping is letting others run."""

    def now_s(self) -> float:
        return 1_700_000_000.0

    def monotonic_s(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


@dataclass(slots=True)
class Agent:
    """One node; `running` may be entered again, on the same tables. `endpoints`: those of the
    identities followed that it has an endpoint of, from when their policy is there."""

    line: Line
    identities: tuple[int, ...]
    endpoints: tuple[int, ...]
    tables: Tables = field(default_factory=Tables.memory)
    saved: bytes = b""
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    enforcement: Enforcement | None = None
    revision: int = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Subscription]:
        view = checkpoint.unpack_view(self.saved) if self.saved else View()
        self.enforcement = Enforcement(self.tables, view, own_nodes=frozenset(["n1"]))
        rows = {endpoint(identity)[0]: endpoint(identity)[1] for identity in self.endpoints}
        held = dict(self.tables.endpoints.items())
        self.enforcement.recover({at: row for at, row in rows.items() if at in held})
        self.revision = 0
        subscription = Subscription(
            [Door("line", self.line)],  # type: ignore[arg-type]  # what of a stub is used
            node="n1",
            enforcement=self.enforcement,
            clock=NoWait(),
            jitter=random.Random(1),
            before=lambda: None,
            on_realised=self._realised,
            answer_s=0.1,
        )
        for identity in self.identities:
            subscription.want(NumericIdentity(identity))
        async with asyncio.TaskGroup() as group:
            running = group.create_task(subscription.run())
            try:
                yield subscription
            finally:
                running.cancel()

    def save(self) -> None:
        assert self.enforcement is not None
        self.saved = checkpoint.pack_view(self.enforcement.view)

    def _realised(self, realised: Realised) -> None:
        assert self.enforcement is not None
        self.revision = realised.revision
        there = dict(self.tables.endpoints.items())
        for identity in self.endpoints:
            at, row = endpoint(identity)
            known = self.enforcement.problem_of(NumericIdentity(identity)) is None
            if known and at not in there:
                self.enforcement.add_endpoint(at, row)
        self.moved.set()

    async def reached(self, revision: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.revision < revision:
                self.moved.clear()
                await self.moved.wait()


def endpoint(identity: int) -> tuple[int, Endpoint]:
    at = identity - 1000
    flags = EndpointFlags.READY
    return at, Endpoint(at, identity, 0, 0, flags, 0x0A090000 + at, b"\x02" * 6, b"\x04" * 6)


def addresses_in(tables: Tables) -> tuple[dict[int, int], dict[object, int]]:
    found = read(tables)
    return dict(found.ipcache), dict(found.prefixes)
