"""ipamd and policyd, asked who somebody is. identityd is asked through identities/backend.py."""

from __future__ import annotations

import grpc.aio
from tessera_wire.ipam.v1 import ipam_pb2, ipam_pb2_grpc
from tessera_wire.policy.v1 import policy_pb2, policy_pb2_grpc

from services.apid.backends import RPC_DEADLINE_S
from services.apid.policies.backend import ref_of
from services.apid.whois import model
from services.wire.client import call


class Allocations:
    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub = ipam_pb2_grpc.IpamServiceStub(to)

    async def of_address(self, ip: str) -> tuple[model.Allocation, ...]:
        request = ipam_pb2.ListAddressesRequest(ip=ip)
        answer = await call(self._stub.ListAddresses, request, deadline_s=RPC_DEADLINE_S)
        return tuple(map(_allocation, answer.addresses))


class Selections:
    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub = policy_pb2_grpc.PolicyQuestionsStub(to)

    async def of(self, text: str) -> tuple[model.Selected, tuple[str, ...]]:
        """And the labels by which policies know it. Raises `NotFound`."""
        request = policy_pb2.WhoRequest(text=text)
        answer = await call(self._stub.Who, request, deadline_s=RPC_DEADLINE_S)
        selected = model.Selected(
            identity=answer.identity,
            ingress_enforced=answer.ingress_enforced,
            egress_enforced=answer.egress_enforced,
            ingress=tuple(map(ref_of, answer.ingress_policies)),
            egress=tuple(map(ref_of, answer.egress_policies)),
        )
        return selected, tuple(answer.labels)


def _allocation(message: ipam_pb2.Address) -> model.Allocation:
    owner = f"{message.owner.namespace}/{message.owner.name}"
    return model.Allocation(message.ip, message.pool, message.block, message.node, owner)
