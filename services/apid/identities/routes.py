"""/v1/identities and /v1/endpoints: who the numbers are, who uses them, how many are left."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta
from tessera_wire.identity.v1 import queries_pb2 as pb

from services.apid.backends import Backends
from services.apid.identities import model, rules
from services.apid.identities.backend import Identities
from services.apid.identities.watch import EVENTS, IdentityWatch, WatchQuery
from services.apid.rest import pages
from services.apid.rest.errors import BAD_QUERY, Refusal
from services.apid.rest.params import Chosen, Labels, Paged, Small
from services.apid.rest.route import AnyRoute, Call, Nothing, Route, Stream
from services.runtime.errors import Invalid, NotFound


class IdentityQuery(Paged, frozen=True, kw_only=True):
    labels: Labels = ""


class IdentityPath(Chosen, frozen=True, kw_only=True):
    id: Small


class EndpointQuery(Paged, frozen=True, kw_only=True):
    id: Small


class AnnouncedQuery(Paged, frozen=True, kw_only=True):
    endpoint: Annotated[str, Meta(description="namespace/name, or a name in any namespace.")] = ""
    node: str = ""
    cidr: Annotated[str, Meta(description="Addresses within it.", examples=["10.244.0.0/24"])] = ""


class UsageQuery(Paged, frozen=True, kw_only=True):
    namespace: Annotated[str, Meta(description="Only identities of this one.")] = ""
    key: Annotated[str, Meta(description="Only this label key, with up to 1,000 values.")] = ""


class IdentityHandlers:
    def __init__(self, identities: Identities) -> None:
        self._identities = identities

    async def list_identities(self, call: Call[IdentityQuery]) -> model.Identities:
        query = call.takes
        after, at = pages.position(query, tuple[int, int]) or (0, 0)
        found, revision, more = await self._identities.list(query.labels, query.limit, after, at)
        following = pages.cursor(query, (found[-1].id, revision)) if more else ""
        return model.Identities(found, revision, following)

    async def get_identity(self, call: Call[IdentityPath]) -> model.Identity:
        return await self._identities.get(call.takes.id)

    async def references(self, call: Call[IdentityPath]) -> model.References:
        return await self._identities.references(call.takes.id)

    async def list_endpoints(self, call: Call[AnnouncedQuery]) -> model.Endpoints:
        query = call.takes
        only = {name: getattr(query, name) for name in ("endpoint", "node", "cidr")}
        named = {name: text for name, text in only.items() if text}
        if len(named) > 1:
            raise Refusal(BAD_QUERY, f"give one of {' and '.join(named)}, not both")
        after = pages.position(query, str) or ""
        request = pb.AddressesRequest(**named, limit=query.limit, after=after)
        found, more = await self._identities.endpoints(request)
        return model.Endpoints(found, pages.cursor(query, found[-1].ip) if more else "")

    async def endpoints(self, call: Call[EndpointQuery]) -> model.Endpoints:
        query = call.takes
        after = pages.position(query, str) or ""
        request = pb.AddressesRequest(identity=query.id, limit=query.limit, after=after)
        found, more = await self._identities.endpoints(request)
        return model.Endpoints(found, pages.cursor(query, found[-1].ip) if more else "")

    async def stats(self, _call: Call[Nothing]) -> model.Stats:
        return await self._identities.stats()

    async def usage(self, call: Call[UsageQuery]) -> model.Usage:
        query = call.takes
        whole = await self._identities.usage(query.namespace, query.key)
        keys, following = pages.page(query, whole.keys, _usage_key)
        return model.Usage(keys, whole.namespaces, following)


def routes(backends: Backends) -> tuple[AnyRoute, ...]:
    identities = Identities(backends.identityd)
    on, watch = IdentityHandlers(identities), IdentityWatch(identities)
    return (
        Route(
            "GET", "/v1/identities", "Identities, by number, at one revision",
            on.list_identities, IdentityQuery, model.Identities,
            items="identities", raises=(Invalid,), example=_IDENTITIES,
        ),
        Route(
            "GET", "/v1/identities/stats", "How many numbers are left, and for how long",
            on.stats, Nothing, model.Stats, example=_STATS,
        ),
        Route(
            "GET", "/v1/identities/usage", "Which label keys and namespaces the numbers go to",
            on.usage, UsageQuery, model.Usage, items="keys", example=_USAGE,
        ),
        *rules.routes(backends),
        Stream(
            "/v1/identities/watch", "The list, then its changes",
            watch.watch, WatchQuery, EVENTS, raises=(Invalid,),
        ),
        Route(
            "GET", "/v1/identities/{id}", "One identity",
            on.get_identity, IdentityPath, model.Identity,
            raises=(NotFound,), example=_IDENTITIES.identities[0],
        ),
        Route(
            "GET", "/v1/endpoints", "What nodes have announced, by address, with its identity",
            on.list_endpoints, AnnouncedQuery, model.Endpoints, items="endpoints",
            raises=(Invalid,), example=_ENDPOINTS,
        ),
        Route(
            "GET", "/v1/identities/{id}/references", "Which nodes use it, for which endpoints",
            on.references, IdentityPath, model.References, items="references",
            raises=(NotFound,), example=_REFERENCES,
        ),
        Route(
            "GET", "/v1/identities/{id}/endpoints", "The endpoints that have it, by address",
            on.endpoints, EndpointQuery, model.Endpoints, items="endpoints",
            raises=(NotFound, Invalid), example=_ENDPOINTS,
        ),
    )  # fmt: skip


def _usage_key(usage: model.KeyUsage) -> tuple[str, ...]:
    """Most values first, as identityd sends them."""
    return (f"{2**32 - usage.values:010d}", usage.key)


_LABELS = ("k8s:app=db", "k8s:io.kubernetes.pod.namespace=shop")
_ENDPOINT = model.Endpoint("10.244.0.7", 16423, "shop", "db", "node-1", "192.0.2.1")
_IDENTITIES = model.Identities((model.Identity(16423, _LABELS, ("node-1",), "cluster", 1),), 512)
_ENDPOINTS = model.Endpoints((_ENDPOINT,))
_REFERENCES = model.References(16423, _LABELS, (model.Reference("node-1", True, (_ENDPOINT,)),))
_STATS = model.Stats(
    cluster="default", cluster_id=0, revision=512, total=65280, used=812, quarantined=14,
    free=64454, pressure="none", unreferenced=3, references=2210, addresses=2240, nodes=12,
    namespaces=9, window_s=600.0, created_per_s=0.4, collected_per_s=0.1, exhausted_in_s=214846.7,
)  # fmt: skip
_USAGE = model.Usage(
    (model.KeyUsage("app", 812, 64, (model.ValueUsage("web", 210),)),),
    (model.NamespaceUsage("shop", 420),),
)
