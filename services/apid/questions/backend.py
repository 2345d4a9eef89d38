"""policyd, asked why and what if."""

from __future__ import annotations

from typing import Final

import grpc.aio
from tessera_wire.policy.v1 import policy_pb2, policy_pb2_grpc

from services.apid.backends import RPC_DEADLINE_S
from services.apid.policies.backend import problem_of, ref_of
from services.apid.questions import model
from services.policy.questions import Ports
from services.wire.client import call

# A hundred thousand connections, judged twice.
DIFF_DEADLINE_S: Final = 60.0


class Questions:
    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub = policy_pb2_grpc.PolicyQuestionsStub(to)

    async def explain(self, asked: model.Connection) -> model.Explained:
        """Raises Invalid for a port that is not written as one, NotFound for an end."""
        request = policy_pb2.ExplainRequest(connection=_connection(asked))
        answer = await call(self._stub.Explain, request, deadline_s=RPC_DEADLINE_S)
        ends = tuple(map(_end, answer.ends))
        return model.Explained(
            asked.source, asked.target, asked.port, answer.verdict, ends, answer.revision
        )

    async def diff(self, asked: model.Candidates) -> model.Difference:
        ports = [Ports.parse(text) for text in asked.ports]
        request = policy_pb2.DiffRequest(
            manifests=[
                policy_pb2.Manifests(text=one.text.encode(), source=one.source)
                for one in asked.manifests
            ],
            default_namespace=asked.namespace,
            deleted=[
                policy_pb2.PolicyRef(kind=ref.kind, namespace=ref.namespace, name=ref.name)
                for ref in asked.deleted
            ],
            connections=map(_connection, asked.connections),
            ports=[policy_pb2.PortQuestion(proto=p.proto, port=p.port) for p in ports],
        )
        answer = await call(self._stub.Diff, request, deadline_s=DIFF_DEADLINE_S)
        return model.Difference(
            denied=tuple(map(_change, answer.denied)),
            allowed=tuple(map(_change, answer.allowed)),
            changed=tuple(map(_change, answer.changed)),
            denied_count=answer.denied_count,
            allowed_count=answer.allowed_count,
            changed_count=answer.changed_count,
            unchanged=answer.unchanged_count,
            problems=tuple(map(problem_of, answer.problems)),
            revision=answer.revision,
        )


def _connection(asked: model.Connection) -> policy_pb2.Connection:
    ports = Ports.parse(asked.port)
    return policy_pb2.Connection(
        source=asked.source, target=asked.target, proto=ports.proto, port=ports.port
    )


def _end(message: policy_pb2.End) -> model.End:
    return model.End(
        direction=policy_pb2.Direction.Name(message.direction).lower(),
        identity=message.identity,
        peer=message.peer,
        verdict=message.verdict,
        reason=message.reason,
        rules=tuple(map(_rule, message.rules)),
        policies=tuple(map(ref_of, message.policies)),
        misses=tuple(model.Miss(miss.lacks, _rule(miss.rule)) for miss in message.misses),
    )


def _rule(message: policy_pb2.Rule) -> model.Rule:
    policy = message.policy
    return model.Rule(
        policy.kind,
        policy.namespace,
        policy.name,
        message.rule_index,
        message.clause,
        message.line,
        message.log,
    )


def _change(message: policy_pb2.ConnectionChange) -> model.Change:
    at = message.connection
    port = str(Ports(at.proto, at.port))
    return model.Change(at.source, at.target, port, message.before, message.after, message.reason)
