"""The streams of the agents: PolicyDistribution over gRPC.

    agent --Hello, Interest, Ack, Held--> reading --> Subscription, Nodes
    agent <---------Update--------------- writing <-- Subscription.take

Updates leave as bytes: they are encoded where they are shared (payload.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final, Protocol, TypeAlias

import grpc
import grpc.aio
from tessera_wire.policy.v1.policy_pb2 import AgentMessage, Hello

from identity.numbers import NumericIdentity
from services.policyd.distribute import Distributor
from services.policyd.nodes import Nodes
from services.policyd.subscriber import Subscription
from services.runtime.errors import Invalid
from services.runtime.log import logger
from services.wire.held import Held, held_from_wire

log = logger(__name__)

SERVICE: Final = "tessera.policy.v1.PolicyDistribution"

# How long an agent that has seen more than this replica is kept waiting, so that it is not taken
# back in time. Longer lags are a store that was restored from a copy, or trouble.
_CATCH_UP_S: Final = 3.0

_Context: TypeAlias = "grpc.aio.ServicerContext[AgentMessage, bytes]"


class Progress(Protocol):
    async def reached(self, revision: int) -> None:
        """Returns once this replica has seen `revision`."""
        ...


class PolicyDistribution:
    def __init__(self, distributor: Distributor, nodes: Nodes, progress: Progress) -> None:
        self._distributor = distributor
        self._nodes = nodes
        self._progress = progress

    def register(self, server: grpc.aio.Server) -> None:
        handler: grpc.RpcMethodHandler[AgentMessage, bytes] = grpc.stream_stream_rpc_method_handler(
            self.subscribe, request_deserializer=AgentMessage.FromString
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {"Subscribe": handler}),)
        )

    async def subscribe(self, requests: AsyncIterator[AgentMessage], context: _Context) -> None:
        hello = await _hello(requests)
        identities = map(NumericIdentity, hello.identities)
        held = held_from_wire(hello.held)
        await self._catch_up(hello.node, held)
        with self._distributor.subscribed(hello.node, identities, held) as subscription:
            self._nodes.opened(subscription, hello.stream)
            log.info("agent.subscribed", node=hello.node, count=len(hello.identities))
            try:
                async with asyncio.TaskGroup() as group:
                    reading = group.create_task(self._read(subscription, requests))
                    await _write(subscription, context)
                    reading.cancel()
            finally:
                self._nodes.closed(subscription)
                log.info("agent.gone", node=hello.node, revision=subscription.revision)

    async def _catch_up(self, node: str, held: Held) -> None:
        if held.instance != self._distributor.instance:
            return
        try:
            async with asyncio.timeout(_CATCH_UP_S):
                await self._progress.reached(held.revision)
        except TimeoutError:
            log.warning("agent.ahead", node=node, revision=held.revision)

    async def _read(
        self, subscription: Subscription, requests: AsyncIterator[AgentMessage]
    ) -> None:
        """Does not raise what it has against the agent: the writing side ends the stream, between
        two messages."""
        try:
            async for message in requests:
                self._receive(subscription, message)
        except Invalid as error:
            subscription.end(error)
        else:
            subscription.end()

    def _receive(self, subscription: Subscription, message: AgentMessage) -> None:
        match message.WhichOneof("kind"):
            case "interest":
                subscription.follow(
                    map(NumericIdentity, message.interest.add),
                    map(NumericIdentity, message.interest.remove),
                )
            case "ack":
                failures = {NumericIdentity(f.identity): f.reason for f in message.ack.failures}
                self._nodes.acknowledged(subscription, message.ack.revision, failures)
            case "held":
                log.warning("agent.lost", node=subscription.node, revision=message.held.revision)
                subscription.lost(held_from_wire(message.held))
            case "hello":
                raise Invalid("Hello is the first message of a stream and no other")
            case _:
                pass  # a newer agent's message


async def _write(subscription: Subscription, context: _Context) -> None:
    while True:
        await subscription.woken()
        for message in subscription.take():
            await context.write(message)
            if subscription.ended:
                break
        if subscription.error is not None:
            raise subscription.error
        if subscription.ended:
            return


async def _hello(requests: AsyncIterator[AgentMessage]) -> Hello:
    async for message in requests:
        if message.WhichOneof("kind") == "hello" and message.hello.node:
            return message.hello
        break
    raise Invalid("the first message of a stream is a Hello that names its node")
