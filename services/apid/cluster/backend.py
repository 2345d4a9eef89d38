"""policyd, asked how far the nodes are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import grpc.aio
from tessera_wire.policy.v1 import policy_pb2, policy_pb2_grpc

from services.apid.backends import RPC_DEADLINE_S
from services.apid.cluster import model
from services.wire.client import call

_WAIT_SLACK_S: Final = 5.0


class Nodes:
    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub = policy_pb2_grpc.PolicyAdminStub(to)

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


def _nodes(messages: Sequence[policy_pb2.NodeState]) -> tuple[model.NodeState, ...]:
    return tuple(model.NodeState(m.node, m.connected, m.realised, m.reason) for m in messages)
