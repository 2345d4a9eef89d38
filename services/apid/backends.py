"""The services behind apid: gRPC calls that answer with REST bodies.

Raises what the service raised, or `Retry` naming the service that does not answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tessera_wire.identity.v1 import identity_pb2, identity_pb2_grpc
from tessera_wire.ipam.v1 import ipam_pb2, ipam_pb2_grpc
from tessera_wire.policy.v1 import policy_pb2, policy_pb2_grpc

from services.apid import model
from services.runtime.config import ApidConfig
from services.runtime.errors import TesseraError
from services.runtime.health import OK
from services.wire.client import call, channel

# Longer than the store's own deadline, so that a service can say that the store is at fault.
RPC_DEADLINE_S: Final = 10.0
# Parsing and writing as many policies as one request can hold.
APPLY_DEADLINE_S: Final = 60.0
HEALTH_DEADLINE_S: Final = 1.0
_WAIT_SLACK_S: Final = 5.0


class Identities:
    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub = identity_pb2_grpc.IdentityServiceStub(to)

    async def list(self, selector: str, limit: int, after: int) -> model.Identities:
        request = identity_pb2.ListIdentitiesRequest(selector=selector, limit=limit, after=after)
        answer = await call(self._stub.ListIdentities, request, deadline_s=RPC_DEADLINE_S)
        return model.Identities(tuple(map(_identity, answer.identities)), answer.next)

    async def get(self, number: int) -> model.Identity:
        request = identity_pb2.GetIdentityRequest(id=number)
        return _identity(await call(self._stub.GetIdentity, request, deadline_s=RPC_DEADLINE_S))


class Policies:
    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub = policy_pb2_grpc.PolicyAdminStub(to)

    async def apply(self, request: policy_pb2.ApplyRequest) -> model.Applied:
        answer = await call(self._stub.Apply, request, deadline_s=APPLY_DEADLINE_S)
        return model.Applied(
            answer.revision, _applied(answer.policies), tuple(map(_problem, answer.problems))
        )

    async def delete(self, refs: Iterable[model.Ref], author: str) -> model.Deleted:
        request = policy_pb2.DeleteRequest(
            refs=[
                policy_pb2.PolicyRef(kind=ref.kind, namespace=ref.namespace, name=ref.name)
                for ref in refs
            ],
            author=author,
        )
        answer = await call(self._stub.Delete, request, deadline_s=RPC_DEADLINE_S)
        return model.Deleted(
            answer.revision, _applied(answer.policies), tuple(map(_ref, answer.not_found))
        )

    async def list(self, kind: str, namespace: str, name: str) -> model.StoredPolicies:
        request = policy_pb2.ListRequest(kind=kind, namespace=namespace, name=name)
        answer = await call(self._stub.List, request, deadline_s=RPC_DEADLINE_S)
        return model.StoredPolicies(tuple(map(_stored, answer.policies)), answer.revision)

    async def wait(self, revision: int, timeout_s: float) -> model.Realised:
        request = policy_pb2.WaitRealisedRequest(
            revision=revision, timeout_ms=round(timeout_s * 1000)
        )
        deadline_s = timeout_s + _WAIT_SLACK_S
        answer = await call(self._stub.WaitRealised, request, deadline_s=deadline_s)
        return model.Realised(answer.done, answer.revision, _nodes(answer.nodes))

    async def status(self) -> tuple[model.Counts, tuple[model.NodeState, ...]]:
        answer = await call(
            self._stub.Status, policy_pb2.StatusRequest(), deadline_s=RPC_DEADLINE_S
        )
        counts = model.Counts(
            answer.revision, answer.policies, answer.identities, answer.addresses, answer.groups
        )
        return counts, _nodes(answer.nodes)


class Ipam:
    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub = ipam_pb2_grpc.IpamServiceStub(to)

    async def pools(self) -> model.Pools:
        request = ipam_pb2.ListPoolsRequest()
        answer = await call(self._stub.ListPools, request, deadline_s=RPC_DEADLINE_S)
        return model.Pools(
            tuple(
                model.Pool(p.name, tuple(p.cidrs), p.block_size, p.capacity, p.used)
                for p in answer.pools
            )
        )

    async def blocks(self, node: str) -> model.Blocks:
        request = ipam_pb2.ListBlocksRequest(node=node)
        answer = await call(self._stub.ListBlocks, request, deadline_s=RPC_DEADLINE_S)
        return model.Blocks(
            tuple(model.Block(b.cidr, b.pool, b.node, b.used, b.size) for b in answer.blocks)
        )

    async def addresses(self, node: str, pool: str) -> model.Addresses:
        request = ipam_pb2.ListAddressesRequest(node=node, pool=pool)
        answer = await call(self._stub.ListAddresses, request, deadline_s=RPC_DEADLINE_S)
        return model.Addresses(tuple(map(_address, answer.addresses)))


class Backends:
    def __init__(
        self,
        identityd: grpc.aio.Channel,
        ipamd: grpc.aio.Channel,
        policyd: grpc.aio.Channel,
    ) -> None:
        self.identities = Identities(identityd)
        self.policies = Policies(policyd)
        self.ipam = Ipam(ipamd)
        self._channels = {"identityd": identityd, "ipamd": ipamd, "policyd": policyd}

    async def health(self) -> dict[str, str]:
        async with asyncio.TaskGroup() as group:
            asked = {name: group.create_task(_health(to)) for name, to in self._channels.items()}
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


# ------------------------------------------------------------------ messages to bodies


def _identity(message: identity_pb2.Identity) -> model.Identity:
    return model.Identity(
        message.id, tuple(message.labels.labels), tuple(message.nodes), message.scope
    )


def _ref(message: policy_pb2.PolicyRef) -> model.Ref:
    return model.Ref(message.kind, message.name, message.namespace)


def _applied(messages: Sequence[policy_pb2.AppliedPolicy]) -> tuple[model.AppliedPolicy, ...]:
    return tuple(
        model.AppliedPolicy(m.ref.kind, m.ref.namespace, m.ref.name, m.action) for m in messages
    )


def _problem(message: policy_pb2.PolicyProblem) -> model.PolicyProblem:
    return model.PolicyProblem(
        severity=message.severity,
        message=message.message,
        source=message.source,
        line=message.line,
        column=message.column,
        path=message.path,
        policy=_ref(message.ref) if message.HasField("ref") else None,
    )


def _stored(message: policy_pb2.StoredPolicy) -> model.StoredPolicy:
    return model.StoredPolicy(
        kind=message.ref.kind,
        namespace=message.ref.namespace,
        name=message.ref.name,
        manifest=message.manifest.decode(errors="replace"),
        revision=message.revision,
        author=message.author,
        applied_at=message.applied_at,
        state=message.state,
        selects=message.selects,
    )


def _nodes(messages: Sequence[policy_pb2.NodeState]) -> tuple[model.NodeState, ...]:
    return tuple(model.NodeState(m.node, m.connected, m.realised, m.reason) for m in messages)


def _address(message: ipam_pb2.Address) -> model.Address:
    owner = message.owner
    return model.Address(
        ip=message.ip,
        pool=message.pool,
        block=message.block,
        node=message.node,
        owner=model.Owner(owner.namespace, owner.name, owner.interface, owner.uid),
    )
