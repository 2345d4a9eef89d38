"""The one stream from policyd: interests go up, updates come down, acks go up.

    Hello(identities, what is held) ──► what differs ──► deltas …
    Interest ──►                            │ a gap, or other digests
                                            └─► Held ──► what differs from that ──► deltas …
                    Ack(revision, failures) ──►
    a stream that ends: the next policyd of the list, after a pause, with all that is held

An ack says what the kernel holds, not what has arrived.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import grpc.aio
from tessera_wire.policy.v1 import policy_pb2 as pb

from datapath.agent.enforcement import Realised
from datapath.agent.received import update_from_wire
from datapath.agent.view import OutOfStep, Update, View
from identity.numbers import NumericIdentity
from services.runtime.clock import Clock
from services.runtime.errors import Retry, TesseraError
from services.runtime.log import logger
from services.wire.client import trace_metadata, translate
from services.wire.held import NOTHING, Held, held_to_wire

if TYPE_CHECKING:
    Stream = grpc.aio.StreamStreamCall[pb.AgentMessage, pb.Update]

log = logger(__name__)

Decode = Callable[[pb.Update], Update]

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 4.0
# What is asked of a policyd is answered within it, or another one is asked. A process that was
# stopped still has its connections, and its kernel accepts new ones.
FIRST_ANSWER_S = 15.0


class Stub(Protocol):
    def Subscribe(self, *, metadata: Sequence[tuple[str, str]]) -> Stream: ...


@dataclass(frozen=True, slots=True)
class Door:
    """One policyd."""

    target: str
    stub: Stub


class Realiser(Protocol):
    @property
    def view(self) -> View: ...
    def realise(self, batch: Sequence[Update]) -> Realised: ...
    def problem_of(self, identity: NumericIdentity) -> str | None: ...


class Subscription:
    """`before` and `on_realised` run before and after each batch, in order. Agents begin with any
    of `doors`, so that they are spread over them."""

    def __init__(
        self,
        doors: Sequence[Door],
        *,
        node: str,
        enforcement: Realiser,
        clock: Clock,
        jitter: random.Random,
        before: Callable[[], None],
        on_realised: Callable[[Realised], None],
        decode: Decode = update_from_wire,
        answer_s: float = FIRST_ANSWER_S,
        heard_s: float = 0.0,
        admit: Callable[[], None] = lambda: None,
    ) -> None:
        """`heard_s`: wall time of the last word that an earlier run had. `admit` raises when no
        endpoint may be made now."""
        self._heard_s = heard_s
        self._admit = admit
        self._decode = decode
        self._answer_s = answer_s
        self._doors = doors
        self._door = jitter.randrange(len(doors))
        self._tried = 0
        self._node = node
        self._enforcement = enforcement
        self._clock = clock
        self._jitter = jitter
        self._before = before
        self._on_realised = on_realised
        self._wanted: Counter[NumericIdentity] = Counter()
        self._asked: set[NumericIdentity] = set()
        self._stream_number = 0
        self._ack: pb.Ack | None = None
        self._held: Held | None = None
        self._asked_for: Held | None = None
        self._to_send = asyncio.Event()
        self._moved = asyncio.Condition()
        self.connected = False
        self.error = "not connected yet"
        self.realised = Realised(0, {}, 0)
        self._pause_s = FIRST_PAUSE_S

    # -------------------------------------------------------------- what is wanted

    def want(self, identity: NumericIdentity) -> None:
        """Counted: as many `unwant` take it back."""
        self._wanted[identity] += 1
        self._to_send.set()

    def unwant(self, identity: NumericIdentity) -> None:
        self._wanted[identity] -= 1
        if self._wanted[identity] <= 0:
            del self._wanted[identity]
        self._to_send.set()

    async def in_force(self, identity: NumericIdentity, timeout: float) -> None:
        """Returns once a policy of the identity is in the tables. Raises `Retry` with the reason
        why not after `timeout` seconds."""
        self._admit()
        try:
            async with asyncio.timeout(timeout), self._moved:
                await self._moved.wait_for(lambda: self._enforcement.problem_of(identity) is None)
        except TimeoutError:
            problem = self._enforcement.problem_of(identity)
            away = "" if self.connected else f"; policyd: {self.error}"
            raise Retry(f"no policy for identity {identity}: {problem}{away}") from None

    # -------------------------------------------------------------- the stream

    @property
    def target(self) -> str:
        """The policyd it is connected to, or tries next."""
        return self._doors[self._door].target

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._follow()
            # What grpc.aio raises for a write to a stream that has just ended is no RpcError.
            except* (TesseraError, grpc.aio.AioRpcError, asyncio.InvalidStateError) as group:
                self._away(_first(group))
            self._tried += 1
            self._door = (self._door + 1) % len(self._doors)
            await self._clock.sleep(self._pause_s * self._jitter.uniform(0.1, 1.0))
            if self._tried % len(self._doors) == 0:
                self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)

    def _away(self, error: BaseException) -> None:
        if isinstance(error, grpc.aio.AioRpcError):
            error = translate(error, self.target, service="policyd")
        if self.error != str(error):
            log.warning("subscription.away", error=str(error), pause_s=self._pause_s)
        self._heard_s = self.heard_s
        self.connected, self.error = False, str(error)

    @property
    def heard_s(self) -> float:
        """Wall time until which the view is known to be the newest; 0: it never was."""
        return self._clock.now_s() if self.connected else self._heard_s

    async def _follow(self) -> None:
        view = self._enforcement.view
        stream = self._doors[self._door].stub.Subscribe(metadata=trace_metadata())
        try:
            view.lost()
            self._ack, self._held = None, None
            self._asked_for = view.holding()
            self._asked = set(self._wanted)
            async with asyncio.timeout(self._answer_s) as limit, asyncio.TaskGroup() as group:
                await stream.write(pb.AgentMessage(hello=self._hello(self._asked_for)))
                writer = group.create_task(self._send(stream))
                await self._receive(stream, limit)
                writer.cancel()
        except TimeoutError:
            raise Retry(f"policyd at {self.target} did not answer in time") from None
        finally:
            stream.cancel()

    def _hello(self, held: Held) -> pb.Hello:
        # Wall time, so that a restarted agent counts on from where it was.
        self._stream_number = max(self._stream_number + 1, round(self._clock.now_s() * 1000))
        return pb.Hello(
            node=self._node,
            identities=sorted(self._asked),
            held=held_to_wire(held),
            stream=self._stream_number,
        )

    async def _receive(self, stream: Stream, limit: asyncio.Timeout) -> None:
        batch: list[Update] = []
        while True:
            message = await stream.read()
            if message is grpc.aio.EOF:
                raise Retry("policyd ended the stream")
            assert isinstance(message, pb.Update)
            batch.append(self._decode(message))
            if not message.more:
                await self._realise(batch)
                batch = []
            waiting = self._asked_for is not None
            now = asyncio.get_running_loop().time()
            limit.reschedule(now + self._answer_s if waiting else None)

    async def _realise(self, batch: list[Update]) -> None:
        if not self.connected:
            log.info("subscription.connected", server=self.target, revision=batch[-1].revision)
        self.connected, self.error, self._pause_s, self._tried = True, "", FIRST_PAUSE_S, 0
        self._before()
        before = self.realised.failures
        try:
            self.realised = self._enforcement.realise(batch)
        except OutOfStep as error:
            self._out_of_step(error, batch)
            return
        self._asked_for = None
        if self.realised.failures != before:
            _log_failures(self.realised)
        self._ack = pb.Ack(
            revision=self.realised.revision,
            failures=[
                pb.Failure(identity=identity, reason=reason)
                for identity, reason in sorted(self.realised.failures.items())
            ],
        )
        self._to_send.set()
        self._on_realised(self.realised)
        async with self._moved:
            self._moved.notify_all()

    def _out_of_step(self, error: OutOfStep, batch: Sequence[Update]) -> None:
        """Asks for what differs from what is held; when that was answered and is not right either,
        for everything. An answer that does not come ends the stream."""
        if self._asked_for is not None and not batch[0].is_whole:
            return  # sent before the question was read
        again = self._asked_for is not None
        self._asked_for = NOTHING if again else self._enforcement.view.holding()
        log.warning("subscription.out_of_step", reason=str(error), state="all" if again else "rest")
        self._held = self._asked_for
        self._to_send.set()

    async def _send(self, stream: Stream) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            now = set(self._wanted)
            added, gone = now - self._asked, self._asked - now
            self._asked = now
            if added or gone:
                interest = pb.Interest(add=sorted(added), remove=sorted(gone))
                await stream.write(pb.AgentMessage(interest=interest))
            held, self._held = self._held, None
            if held is not None:
                await stream.write(pb.AgentMessage(held=held_to_wire(held)))
            ack, self._ack = self._ack, None
            if ack is not None:
                await stream.write(pb.AgentMessage(ack=ack))


def _log_failures(realised: Realised) -> None:
    for identity, reason in sorted(realised.failures.items()):
        log.warning(
            "policy.unrealised", identity=identity, reason=reason, revision=realised.revision
        )
    if not realised.failures:
        log.info("policy.realised", revision=realised.revision)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
