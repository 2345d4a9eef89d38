"""/v1/policies: what may talk to what."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Annotated

import msgspec
from tessera_wire.policy.v1 import policy_pb2

from services.apid.backends import Backends
from services.apid.policies import model
from services.apid.policies.backend import Policies
from services.apid.rest import pages
from services.apid.rest.errors import BAD_BODY, BAD_QUERY, INVALID, Refusal
from services.apid.rest.params import Chosen, Paged
from services.apid.rest.route import Answer, AnyRoute, Body, Call, Event, Nothing, Route, Stream
from services.policy.clauses import PolicyRef
from services.policy.parse import parse
from services.runtime.errors import Conflict, Invalid, NotFound

_NO_NAMESPACE = "_"
# A revision that nothing has.
_NEVER = 2**63 - 1


class ApplyQuery(Nothing, frozen=True):
    namespace: str = "default"
    dry_run: bool = False
    source: str = "request body"
    author: str = ""


class PolicyQuery(Paged, frozen=True, kw_only=True):
    kind: str = ""
    namespace: str = ""
    name: str = ""


class DeleteQuery(Nothing, frozen=True):
    namespace: str = "default"
    source: str = "request body"
    author: str = ""


class PolicyPath(Nothing, frozen=True):
    kind: str
    namespace: str
    name: str
    author: str = ""


class OnePath(Chosen, frozen=True, kw_only=True):
    kind: str
    namespace: str
    name: str


class PutPath(Nothing, frozen=True):
    kind: str
    namespace: str
    name: str
    dry_run: bool = False
    source: str = "request body"
    author: str = ""


class StatusPath(Nothing, frozen=True):
    kind: str
    namespace: str
    name: str


class HistoryQuery(Nothing, frozen=True):
    """`limit`: changes, the newest first."""

    kind: str = ""
    namespace: str = ""
    name: str = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 500


class RollbackQuery(Nothing, frozen=True):
    """Without `name`: all policies."""

    revision: Annotated[int, msgspec.Meta(ge=1)]
    kind: str = ""
    namespace: str = ""
    name: str = ""
    author: str = ""
    dry_run: bool = False


_MANIFESTS = (Body("application/yaml"), Body("application/json"))
_NAMES = (Body("application/yaml"), Body("application/json", model.Refs))


class PolicyHandlers:
    def __init__(self, policies: Policies) -> None:
        self._policies = policies

    async def apply(self, call: Call[ApplyQuery]) -> model.Applied:
        query = call.takes
        return await self._applied(
            policy_pb2.ApplyRequest(
                manifests=call.body,
                default_namespace=query.namespace,
                dry_run=query.dry_run,
                author=query.author,
                source=query.source,
            )
        )

    async def _applied(self, request: policy_pb2.ApplyRequest) -> model.Applied:
        applied = await self._policies.apply(request)
        if any(problem.severity == "error" for problem in applied.problems):
            raise refusal(applied.problems, "nothing was applied")
        return applied

    async def get_policy(self, call: Call[OnePath]) -> Answer:
        ref = _at(call.takes)
        found, _ = await self._policies.list(ref.kind, ref.namespace, ref.name)
        if not found:
            raise _absent(ref)
        return Answer(found[0], str(found[0].revision))

    async def put_policy(self, call: Call[PutPath]) -> model.Applied:
        at, ref = call.takes, _at(call.takes)
        named = {one.policy.ref for one in parse(call.body, at.source, ref.namespace).policies}
        others = named - {PolicyRef(ref.kind, ref.namespace, ref.name)}
        if others:
            raise Invalid(f"the path names {ref.kind} {ref.name}, the body {min(others)}")
        return await self._applied(
            policy_pb2.ApplyRequest(
                manifests=call.body,
                default_namespace=ref.namespace,
                dry_run=at.dry_run,
                author=at.author,
                source=at.source,
                expected=_revisions(call.if_match),
            )
        )

    async def list_policies(self, call: Call[PolicyQuery]) -> model.StoredPolicies:
        query = call.takes
        found, revision = await self._policies.list(query.kind, query.namespace, query.name)
        shown, following = pages.page(query, sorted(found, key=_key), _key)
        return model.StoredPolicies(shown, revision, following)

    async def delete_policy(self, call: Call[PolicyPath]) -> model.Deleted:
        at = call.takes
        ref = _at(at)
        deleted = await self._policies.delete([ref], at.author, _revisions(call.if_match))
        if deleted.not_found:
            raise _absent(ref)
        return deleted

    async def delete_policies(self, call: Call[DeleteQuery]) -> model.Deleted:
        return await self._policies.delete(_refs(call.body, call.takes), call.takes.author)

    async def status(self, call: Call[StatusPath]) -> model.PolicyStatus:
        return await self._policies.status(_at(call.takes))

    async def watch_status(self, call: Call[StatusPath]) -> AsyncGenerator[Event, None]:
        ref = _at(call.takes)
        await self._policies.status(ref)
        return self._statuses(ref)

    async def _statuses(self, ref: model.Ref) -> AsyncGenerator[Event, None]:
        async with aclosing(self._policies.watch_status(ref)) as statuses:
            async for status in statuses:
                yield Event("status", status)

    async def history(self, call: Call[HistoryQuery]) -> model.PolicyHistory:
        at = call.takes
        return await self._policies.history(model.Ref(at.kind, at.name, at.namespace), at.limit)

    async def rollback(self, call: Call[RollbackQuery]) -> model.Applied:
        at = call.takes
        if bool(at.kind) != bool(at.name):
            raise Refusal(BAD_QUERY, "give kind and name of one policy, or neither for all")
        ref = model.Ref(at.kind, at.name, at.namespace)
        return await self._policies.rollback(ref, at.revision, at.author, dry_run=at.dry_run)


def routes(backends: Backends) -> tuple[AnyRoute, ...]:
    on = PolicyHandlers(Policies(backends.policyd))
    return (
        Route(
            "GET", "/v1/policies", "Policies as they were applied, with their state",
            on.list_policies, PolicyQuery, model.StoredPolicies, items="policies",
        ),
        Route(
            "POST", "/v1/policies", "Apply all documents, or none of them",
            on.apply, ApplyQuery, model.Applied,
            body=_MANIFESTS, raises=(Invalid, Conflict), refusal=model.Refused,
        ),
        Route(
            "POST", "/v1/policies/delete", "Delete what is named, by documents or references",
            on.delete_policies, DeleteQuery, model.Deleted,
            body=_NAMES, raises=(Invalid, Conflict),
        ),
        Route(
            "GET", "/v1/policies/{kind}/{namespace}/{name}", "One policy; _ for no namespace",
            on.get_policy, OnePath, model.StoredPolicy, raises=(NotFound,),
        ),
        Route(
            "PUT", "/v1/policies/{kind}/{namespace}/{name}", "Create or replace one",
            on.put_policy, PutPath, model.Applied,
            body=_MANIFESTS, raises=(Invalid,), refusal=model.Refused, guarded=True,
        ),
        Route(
            "DELETE", "/v1/policies/{kind}/{namespace}/{name}", "Delete one; _ for no namespace",
            on.delete_policy, PolicyPath, model.Deleted, raises=(NotFound, Invalid), guarded=True,
        ),
        Route(
            "GET", "/v1/policies/{kind}/{namespace}/{name}/status",
            "How far one policy is, on each node that it concerns",
            on.status, StatusPath, model.PolicyStatus, items="nodes", raises=(NotFound,),
        ),
        Stream(
            "/v1/policies/{kind}/{namespace}/{name}/status/events",
            "The same whenever it changes, until the policy is deleted",
            on.watch_status, StatusPath, {"status": model.PolicyStatus}, raises=(NotFound,),
        ),
        Route(
            "GET", "/v1/policies/history", "Changes of policies: who, when, and the difference",
            on.history, HistoryQuery, model.PolicyHistory, items="changes",
        ),
        Route(
            "POST", "/v1/policies/rollback", "One policy or all, as at `revision`",
            on.rollback, RollbackQuery, model.Applied, raises=(NotFound, Invalid, Conflict),
        ),
    )  # fmt: skip


def _absent(ref: model.Ref) -> NotFound:
    policy = PolicyRef(ref.kind, ref.namespace, ref.name)
    return NotFound(f"policy {policy} does not exist; see GET /v1/policies")


def _revisions(versions: tuple[str, ...] | None) -> list[int]:
    """Of If-Match; a tag that no policy ever had is met by none."""
    if versions is None:
        return []
    return [int(one) for one in versions if one.isascii() and one.isdecimal()] or [_NEVER]


def _at(path: OnePath | PutPath | StatusPath | PolicyPath) -> model.Ref:
    namespace = "" if path.namespace == _NO_NAMESPACE else path.namespace
    return model.Ref(path.kind, path.name, namespace)


def _key(policy: model.StoredPolicy) -> tuple[str, ...]:
    return (policy.kind, policy.namespace, policy.name)


def refusal(problems: tuple[model.PolicyProblem, ...], what: str) -> Refusal:
    errors = [problem for problem in problems if problem.severity == "error"]
    first, more = errors[0], len(errors) - 1
    where = f"{first.source}:{first.line}:{first.column}: " if first.line else ""
    others = f" (and {more} more)" if more else ""
    detail = f"{what}: {where}{first.message}{others}"
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    body = model.Refused(INVALID.type, INVALID.title, status, detail, problems)
    return Refusal(INVALID, detail, body=body)


def _refs(body: bytes, query: DeleteQuery) -> tuple[model.Ref, ...]:
    """Of {"refs": [...]}, or of manifests, which need not be good beyond their names."""
    try:
        return msgspec.json.decode(body, type=model.Refs).refs
    except msgspec.ValidationError as error:
        if b'"refs"' in body:
            raise Refusal(BAD_BODY, f"body: {error}") from error
    except msgspec.DecodeError:
        pass  # not JSON: manifests
    parsed = parse(body, query.source, query.namespace)
    named = [found.policy.ref for found in parsed.policies]
    named += [problem.ref for problem in parsed.problems if problem.ref is not None]
    nameless = [p for p in parsed.problems if p.ref is None and p.severity == "error"]
    if nameless:
        first = nameless[0]
        raise Invalid(f"{first.source}:{first.line}:{first.column}: {first.message}")
    return tuple(model.Ref(ref.kind, ref.name, ref.namespace) for ref in dict.fromkeys(named))
