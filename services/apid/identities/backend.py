"""identityd, asked on behalf of REST."""

from __future__ import annotations

import grpc.aio
from tessera_wire.identity.v1 import identity_pb2, identity_pb2_grpc

from services.apid.backends import RPC_DEADLINE_S
from services.apid.identities import model
from services.wire.client import call


class Identities:
    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub = identity_pb2_grpc.IdentityServiceStub(to)

    async def list(
        self, selector: str, limit: int, after: int
    ) -> tuple[tuple[model.Identity, ...], int]:
        """A page, and after which number the next one begins; 0: there is none."""
        request = identity_pb2.ListIdentitiesRequest(selector=selector, limit=limit, after=after)
        answer = await call(self._stub.ListIdentities, request, deadline_s=RPC_DEADLINE_S)
        return tuple(map(_identity, answer.identities)), answer.next

    async def get(self, number: int) -> model.Identity:
        request = identity_pb2.GetIdentityRequest(id=number)
        return _identity(await call(self._stub.GetIdentity, request, deadline_s=RPC_DEADLINE_S))


def _identity(message: identity_pb2.Identity) -> model.Identity:
    return model.Identity(
        message.id, tuple(message.labels.labels), tuple(message.nodes), message.scope
    )
