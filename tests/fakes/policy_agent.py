"""An agent without a kernel: subscribes over gRPC, holds what it is sent, acknowledges it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import grpc.aio
from tessera_wire.policy.v1 import policy_pb2_grpc
from tessera_wire.policy.v1.policy_pb2 import Ack, AgentMessage, Failure, Hello, Interest, Update

from services.runtime.errors import TesseraError
from services.wire.client import channel, translate
from tests.fakes.agent_view import AgentView

DEADLINE_S = 10.0

Stream = grpc.aio.StreamStreamCall[AgentMessage, Update]


class PolicyAgent:
    """`acks` false: says nothing about what it has realised."""

    def __init__(self, stream: Stream, *, acks: bool) -> None:
        self.view = AgentView()
        self.failures: Mapping[int, str] = {}
        self.ended: TesseraError | None = None
        self._stream = stream
        self._acks = acks
        self._changed = asyncio.Condition()
        self._writing = asyncio.Lock()

    async def follow(self, *, add: tuple[int, ...] = (), remove: tuple[int, ...] = ()) -> None:
        await self._write(AgentMessage(interest=Interest(add=add, remove=remove)))

    async def acknowledge(self, revision: int) -> None:
        failures = [Failure(identity=i, reason=r) for i, r in self.failures.items()]
        await self._write(AgentMessage(ack=Ack(revision=revision, failures=failures)))

    async def _write(self, message: AgentMessage) -> None:
        async with self._writing:  # gRPC takes one message at a time
            await self._stream.write(message)

    async def until(self, condition: Callable[[AgentView], bool]) -> AgentView:
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(lambda: self.ended or condition(self.view))
        assert self.ended is None, self.ended
        return self.view

    async def reached(self, revision: int) -> AgentView:
        return await self.until(lambda view: view.complete and view.revision >= revision)

    async def end(self) -> TesseraError:
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(lambda: self.ended)
        assert self.ended is not None
        return self.ended

    async def read(self) -> None:
        try:
            async for update in self._stream:
                async with self._changed:
                    self.view.apply(update)
                    self._changed.notify_all()
                if self._acks and self.view.complete:
                    await self.acknowledge(self.view.revision)
        except grpc.aio.AioRpcError as error:
            async with self._changed:
                self.ended = translate(error, "policyd")
                self._changed.notify_all()


@asynccontextmanager
async def policy_agent(
    target: str, node: str, *identities: int, acks: bool = True, stream: int = 0
) -> AsyncIterator[PolicyAgent]:
    """Connected, the snapshot received."""
    async with channel(target) as dialled, asyncio.TaskGroup() as group:
        opened = policy_pb2_grpc.PolicyDistributionStub(dialled).Subscribe()
        hello = Hello(node=node, identities=identities, stream=stream)
        await opened.write(AgentMessage(hello=hello))
        agent = PolicyAgent(opened, acks=acks)
        reading = group.create_task(agent.read())
        try:
            await agent.until(lambda view: view.updates > 0)
            yield agent
        finally:
            opened.cancel()
            reading.cancel()
