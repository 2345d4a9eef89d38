"""The one stream from policyd: interests go up, updates come down, acks go up.

    Hello(identities) ──► snapshot ──► deltas …        a broken stream: pause, Hello, snapshot,
    Interest ──►                                       which is diffed against what is held
                    Ack(revision, failures) ──►

An ack says what the kernel holds, not what has arrived.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import grpc.aio
from tessera_wire.policy.v1 import policy_pb2 as pb

from datapath.agent.enforcement import Realised
from datapath.agent.view import Address, GroupDelta, Update
from identity.numbers import NumericIdentity
from services.policy.clauses import GroupId, RuleId
from services.runtime.clock import Clock
from services.runtime.errors import Retry, TesseraError
from services.runtime.log import logger
from services.wire import convert
from services.wire.client import trace_metadata, translate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tessera_wire.policy.v1.policy_pb2_grpc import PolicyDistributionAsyncStub

    Stream = grpc.aio.StreamStreamCall[pb.AgentMessage, pb.Update]

log = logger(__name__)

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0


class Realiser(Protocol):
    def realise(self, batch: Sequence[Update]) -> Realised: ...
    def problem_of(self, identity: NumericIdentity) -> str | None: ...


class Subscription:
    """`before` and `on_realised` run before and after each batch, in order."""

    def __init__(
        self,
        stub: PolicyDistributionAsyncStub,
        target: str,
        *,
        node: str,
        enforcement: Realiser,
        clock: Clock,
        jitter: random.Random,
        before: Callable[[], None],
        on_realised: Callable[[Realised], None],
    ) -> None:
        self._stub = stub
        self._target = target
        self._node = node
        self._enforcement = enforcement
        self._clock = clock
        self._jitter = jitter
        self._before = before
        self._on_realised = on_realised
        self._wanted: Counter[NumericIdentity] = Counter()
        self._asked: set[NumericIdentity] = set()
        self._ack: pb.Ack | None = None
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
        try:
            async with asyncio.timeout(timeout), self._moved:
                await self._moved.wait_for(lambda: self._enforcement.problem_of(identity) is None)
        except TimeoutError:
            problem = self._enforcement.problem_of(identity)
            away = "" if self.connected else f"; policyd: {self.error}"
            raise Retry(f"no policy for identity {identity}: {problem}{away}") from None

    # -------------------------------------------------------------- the stream

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._follow()
            # What grpc.aio raises for a write to a stream that has just ended is no RpcError.
            except* (TesseraError, grpc.aio.AioRpcError, asyncio.InvalidStateError) as group:
                self._away(_first(group))
            await self._clock.sleep(self._pause_s * self._jitter.uniform(0.5, 1.0))
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)

    def _away(self, error: BaseException) -> None:
        if isinstance(error, grpc.aio.AioRpcError):
            error = translate(error, self._target, service="policyd")
        if self.error != str(error):
            log.warning("subscription.away", error=str(error), pause_s=self._pause_s)
        self.connected, self.error = False, str(error)

    async def _follow(self) -> None:
        stream = self._stub.Subscribe(metadata=trace_metadata())
        try:
            self._ack = None
            self._asked = set(self._wanted)
            hello = pb.Hello(node=self._node, identities=sorted(self._asked))
            await stream.write(pb.AgentMessage(hello=hello))
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._send(stream))
                await self._receive(stream)
                writer.cancel()
        finally:
            stream.cancel()

    async def _receive(self, stream: Stream) -> None:
        batch: list[Update] = []
        while True:
            message = await stream.read()
            if message is grpc.aio.EOF:
                raise Retry("policyd ended the stream")
            assert isinstance(message, pb.Update)
            batch.append(update_from_wire(message))
            if message.more:
                continue
            await self._realise(batch)
            batch = []

    async def _realise(self, batch: list[Update]) -> None:
        if not self.connected:
            log.info("subscription.connected", server=self._target, revision=batch[-1].revision)
        self.connected, self.error, self._pause_s = True, "", FIRST_PAUSE_S
        self._before()
        before = self.realised.failures
        self.realised = self._enforcement.realise(batch)
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


def update_from_wire(message: pb.Update) -> Update:
    """Raises `Invalid` for what no correct policyd sends."""
    return Update(
        revision=message.revision,
        snapshot=message.snapshot,
        more=message.more,
        groups=tuple(
            (GroupId(group.id), convert.unpack_ids(group.identities)) for group in message.groups
        ),
        group_deltas=tuple(
            GroupDelta(
                GroupId(delta.id),
                convert.unpack_ids(delta.added),
                convert.unpack_ids(delta.removed),
            )
            for delta in message.group_deltas
        ),
        local_policies=tuple(map(convert.local_policy_from_wire, message.local_policies)),
        rules=tuple(map(convert.rule_from_wire, message.rules)),
        addresses=tuple(
            Address(a.cidr, NumericIdentity(a.identity), a.node, a.namespace, a.name)
            for a in message.addresses
        ),
        addresses_removed=tuple(message.addresses_removed),
        local_policies_removed=tuple(map(NumericIdentity, message.local_policies_removed)),
        groups_removed=tuple(map(GroupId, message.groups_removed)),
        rules_removed=tuple(map(RuleId, message.rules_removed)),
        traceparent=message.traceparent,
    )
