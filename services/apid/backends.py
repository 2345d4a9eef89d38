"""The services behind apid: one channel each, dialled when first used.

What a noun's backend.py calls over them raises what the service raised, or `Retry` naming the
service that does not answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.runtime.config import ApidConfig
from services.runtime.errors import TesseraError
from services.runtime.health import OK
from services.wire.client import call, channel

# Longer than the store's own deadline, so that a service can say that the store is at fault.
RPC_DEADLINE_S: Final = 10.0
HEALTH_DEADLINE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Backends:
    identityd: grpc.aio.Channel
    ipamd: grpc.aio.Channel
    policyd: grpc.aio.Channel

    async def health(self) -> dict[str, str]:
        """By name: "ok", or what is wrong."""
        channels = {"identityd": self.identityd, "ipamd": self.ipamd, "policyd": self.policyd}
        async with asyncio.TaskGroup() as group:
            asked = {name: group.create_task(_health(to)) for name, to in channels.items()}
        return {name: task.result() for name, task in asked.items()}


@asynccontextmanager
async def connected(config: ApidConfig) -> AsyncIterator[Backends]:
    """Dialled when first used."""
    async with (
        channel(config.identityd) as identityd,
        channel(config.ipamd) as ipamd,
        channel(config.policyd) as policyd,
    ):
        yield Backends(identityd, ipamd, policyd)


async def _health(to: grpc.aio.Channel) -> str:
    check = health_pb2_grpc.HealthStub(to).Check
    try:
        answer = await call(check, health_pb2.HealthCheckRequest(), deadline_s=HEALTH_DEADLINE_S)
    except TesseraError as error:
        return str(error)
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    return OK if serving else "answers, and is not ready"
