"""What each REST path does. A handler takes a request and answers with a body; errors.py does the
rest."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from aiohttp import web
from tessera_wire.policy.v1 import policy_pb2

from services.apid import model
from services.apid.backends import Backends
from services.apid.errors import BadRequest, refused
from services.apid.query import Nothing, Number, Small, Timeout, query_of
from services.policy.clauses import PolicyRef
from services.policy.parse import parse
from services.runtime.errors import Invalid, NotFound, Retry
from services.runtime.health import OK

_NO_NAMESPACE = "_"


class IdentityQuery(msgspec.Struct, frozen=True):
    labels: str = ""
    limit: Small = 0
    after: Small = 0


class ApplyQuery(msgspec.Struct, frozen=True):
    namespace: str = "default"
    dry_run: bool = False
    source: str = "request body"
    author: str = ""


class PolicyQuery(msgspec.Struct, frozen=True):
    kind: str = ""
    namespace: str = ""
    name: str = ""


class DeleteQuery(msgspec.Struct, frozen=True):
    namespace: str = "default"
    source: str = "request body"
    author: str = ""


class AuthorQuery(msgspec.Struct, frozen=True):
    author: str = ""


class WaitQuery(msgspec.Struct, frozen=True):
    revision: Number
    timeout_s: Timeout = 30.0


class BlockQuery(msgspec.Struct, frozen=True):
    node: str = ""


class AddressQuery(msgspec.Struct, frozen=True):
    node: str = ""
    pool: str = ""


class Handlers:
    def __init__(self, backends: Backends) -> None:
        self._backends = backends

    # ------------------------------------------------------------------ status

    async def status(self, request: web.Request) -> web.Response:
        query_of(request, Nothing)
        services = await self._backends.health()
        if services["policyd"] == OK:
            try:
                counts, nodes = await self._backends.policies.status()
                return answer(model.Status(services, counts, nodes))
            except Retry as error:
                services["policyd"] = str(error)
        return answer(model.Status(services, None, ()))

    async def nodes(self, request: web.Request) -> web.Response:
        query_of(request, Nothing)
        counts, nodes = await self._backends.policies.status()
        return answer(model.Nodes(nodes, counts.revision))

    # ------------------------------------------------------------------ identities

    async def identities(self, request: web.Request) -> web.Response:
        query = query_of(request, IdentityQuery)
        return answer(await self._backends.identities.list(query.labels, query.limit, query.after))

    async def identity(self, request: web.Request) -> web.Response:
        query_of(request, Nothing)
        text = request.match_info["id"]
        if not (text.isascii() and text.isdecimal()) or int(text) >= 1 << 32:
            raise NotFound(f"identity {text!r} is not a number from 0 to {2**32 - 1}")
        return answer(await self._backends.identities.get(int(text)))

    # ------------------------------------------------------------------ policies

    async def apply(self, request: web.Request) -> web.Response:
        query = query_of(request, ApplyQuery)
        applied = await self._backends.policies.apply(
            policy_pb2.ApplyRequest(
                manifests=await request.read(),
                default_namespace=query.namespace,
                dry_run=query.dry_run,
                author=query.author,
                source=query.source,
            )
        )
        if any(problem.severity == "error" for problem in applied.problems):
            return _refusal(applied)
        return answer(applied)

    async def policies(self, request: web.Request) -> web.Response:
        query = query_of(request, PolicyQuery)
        return answer(await self._backends.policies.list(query.kind, query.namespace, query.name))

    async def delete_policy(self, request: web.Request) -> web.Response:
        query = query_of(request, AuthorQuery)
        kind, namespace, name = (request.match_info[key] for key in ("kind", "namespace", "name"))
        ref = model.Ref(kind, name, "" if namespace == _NO_NAMESPACE else namespace)
        deleted = await self._backends.policies.delete([ref], query.author)
        if deleted.not_found:
            raise NotFound(
                f"policy {PolicyRef(ref.kind, ref.namespace, ref.name)} does not exist;"
                " see GET /v1/policies"
            )
        return answer(deleted)

    async def delete_policies(self, request: web.Request) -> web.Response:
        query = query_of(request, DeleteQuery)
        refs = _refs(await request.read(), query)
        return answer(await self._backends.policies.delete(refs, query.author))

    async def wait(self, request: web.Request) -> web.Response:
        query = query_of(request, WaitQuery)
        return answer(await self._backends.policies.wait(query.revision, query.timeout_s))

    # ------------------------------------------------------------------ addresses

    async def pools(self, request: web.Request) -> web.Response:
        query_of(request, Nothing)
        return answer(await self._backends.ipam.pools())

    async def blocks(self, request: web.Request) -> web.Response:
        query = query_of(request, BlockQuery)
        return answer(await self._backends.ipam.blocks(query.node))

    async def addresses(self, request: web.Request) -> web.Response:
        query = query_of(request, AddressQuery)
        return answer(await self._backends.ipam.addresses(query.node, query.pool))


def answer(body: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")


def _refusal(applied: model.Applied) -> web.Response:
    errors = [problem for problem in applied.problems if problem.severity == "error"]
    first, more = errors[0], len(errors) - 1
    where = f"{first.source}:{first.line}:{first.column}: " if first.line else ""
    others = f" (and {more} more)" if more else ""
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    detail = f"nothing was applied: {where}{first.message}{others}"
    return refused(model.Refused(status.phrase, status, detail, applied.problems))


def _refs(body: bytes, query: DeleteQuery) -> tuple[model.Ref, ...]:
    """Of {"refs": [...]}, or of manifests, which need not be good beyond their names."""
    try:
        return msgspec.json.decode(body, type=model.Refs).refs
    except msgspec.ValidationError as error:
        if b'"refs"' in body:
            raise BadRequest(f"body: {error}") from error
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
