"""/v1/identities/rules: which labels make an identity, changed while the cluster runs.

Nodes hear of a change and move their endpoints to new identities, which are allowed everywhere
before any endpoint has them.
"""

from __future__ import annotations

import grpc.aio
import msgspec
from tessera_wire.identity.v1 import identity_pb2 as pb
from tessera_wire.identity.v1.identity_pb2_grpc import IdentityServiceStub

from services.apid.backends import RPC_DEADLINE_S, Backends
from services.apid.identities import model
from services.apid.rest.errors import BAD_BODY, PRECONDITION_FAILED, Refusal
from services.apid.rest.route import Answer, AnyRoute, Body, Call, Nothing, Route
from services.runtime.errors import Conflict, Invalid
from services.wire.client import call

_EXAMPLE = '{"label_filter": ["!k8s:uid"], "policy_relevant": false}'


class RulesHandlers:
    def __init__(self, to: grpc.aio.Channel) -> None:
        self._stub = IdentityServiceStub(to)

    async def get_rules(self, _call: Call[Nothing]) -> Answer:
        rules = await self._in_force()
        return Answer(rules, str(rules.revision))

    async def put_rules(self, asked: Call[Nothing]) -> model.Rules:
        try:
            wanted = msgspec.json.decode(asked.body, type=model.WantedRules)
        except msgspec.DecodeError as error:
            raise Refusal(BAD_BODY, f"body: {error}") from error
        now = await self._in_force()
        if asked.if_match is not None and str(now.revision) not in asked.if_match:
            raise _changed(now.revision)
        rules = pb.LabelRules(
            label_filter=wanted.label_filter,
            policy_relevant=wanted.policy_relevant,
            namespace_quota=wanted.namespace_quota,
            warn_values=wanted.warn_values,
            revision=now.revision,
        )
        request = pb.SetLabelRulesRequest(rules=rules)
        try:
            answer = await call(self._stub.SetLabelRules, request, deadline_s=RPC_DEADLINE_S)
        except Conflict:
            if asked.if_match is None:
                raise
            raise _changed((await self._in_force()).revision) from None
        return _rules(answer)

    async def _in_force(self) -> model.Rules:
        request = pb.GetLabelRulesRequest()
        answer = await call(self._stub.GetLabelRules, request, deadline_s=RPC_DEADLINE_S)
        return _rules(answer)


def routes(backends: Backends) -> tuple[AnyRoute, ...]:
    on = RulesHandlers(backends.identityd)
    return (
        Route(
            "GET", "/v1/identities/rules", "Which labels make an identity",
            on.get_rules, Nothing, model.Rules,
        ),
        Route(
            "PUT", "/v1/identities/rules", "Change that; endpoints move without a packet lost",
            on.put_rules, Nothing, model.Rules,
            body=(Body("application/json", model.WantedRules, _EXAMPLE),),
            raises=(Invalid, Conflict), guarded=True,
        ),
    )  # fmt: skip


def _changed(revision: int) -> Refusal:
    return Refusal(
        PRECONDITION_FAILED,
        f"the label rules are now those of revision {revision}, which If-Match does not name",
    )


def _rules(message: pb.LabelRules) -> model.Rules:
    return model.Rules(
        label_filter=tuple(message.label_filter),
        policy_relevant=message.policy_relevant,
        namespace_quota=message.namespace_quota,
        warn_values=message.warn_values,
        revision=message.revision,
        relevant_keys=tuple(message.relevant_keys),
    )
