"""/v1/whois: one question for whatever stands in a log line.

    16423  10.0.0.7  10.0.0.0/24  shop/db  node-1  world
      └── taken as ─┬─► identityd: identity, addresses, endpoints, nodes
                    ├─► ipamd: who was given the address
                    └─► policyd: as what policies see it, and which select it

identityd must answer; of the others it is said that they did not.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable
from ipaddress import ip_address, ip_network
from typing import Annotated, Final, TypeVar

from msgspec import Meta, structs
from tessera_wire.identity.v1 import queries_pb2 as pb

from services.apid.backends import Backends
from services.apid.identities import model as of_identities
from services.apid.identities.backend import Identities
from services.apid.rest.route import AnyRoute, Call, Nothing, Route
from services.apid.whois import model
from services.apid.whois.backend import Allocations, Selections
from services.runtime.errors import Invalid, NotFound, Retry

T = TypeVar("T")

ENDPOINTS: Final = 100
# Identities of a prefix or a node that are shown with their policies.
IDENTITIES: Final = 20
_FORMS: Final = (
    "ask for an identity's number, an address, a CIDR, an endpoint (namespace/name), a node or a"
    " reserved name such as world"
)
_NO_DNS: Final = "; a DNS name has no identity, because policies by name (toFQDNs) are not enforced"
_NAME: Final = re.compile(r"[a-z0-9-]+")


class WhoisQuery(Nothing, frozen=True):
    q: Annotated[
        str,
        Meta(
            min_length=1,
            description="An identity's number, an address, a CIDR, an endpoint (namespace/name, or"
            " its name alone), a node or a reserved name.",
            examples=["10.244.0.7"],
        ),
    ]


class WhoisHandlers:
    def __init__(self, backends: Backends) -> None:
        self._identities = Identities(backends.identityd)
        self._allocations = Allocations(backends.ipamd)
        self._selections = Selections(backends.policyd)

    async def whois(self, call: Call[WhoisQuery]) -> model.Whois:
        q = call.takes.q.strip()
        match kind_of(q):
            case "identity":
                return await self._identity(q, int(q))
            case "address":
                return await self._address(q, str(ip_address(q)))
            case "cidr":
                return await self._cidr(q, str(ip_network(q, strict=False)))
            case "endpoint":
                return await self._endpoint(q)
            case _:
                return await self._name(q)

    async def _identity(self, q: str, number: int) -> model.Whois:
        if number >= 1 << 32:
            raise NotFound(f"{q} is no identity: numbers have 32 bits; {_FORMS}")
        identity = await self._identities.get(number)
        endpoints, more = await self._endpoints(pb.AddressesRequest(identity=number))
        says = [f"{_identity_words(identity)}, on {_count(len(identity.nodes), 'node')}"]
        return await self._with_policies(
            model.Whois(q, "identity", tuple(says), (identity,), endpoints, more)
        )

    async def _address(self, q: str, ip: str) -> model.Whois:
        endpoints, _ = await self._endpoints(pb.AddressesRequest(ip=ip))
        unknown: list[str] = []
        allocations = await _or(self._allocations.of_address(ip), (), unknown)
        says = [f"{ip} is {_endpoint_words(one)}" for one in endpoints]
        says += [
            f"pool {one.pool} gave it to {one.owner} on node {one.node}" for one in allocations
        ]
        found = model.Whois(
            q, "address", tuple(says), (), endpoints, False, allocations, (), tuple(unknown)
        )
        if endpoints:
            return await self._with_identities(found)
        node = await self._node_at(ip)
        return await self._as_policies_see(found, ip, node)

    async def _cidr(self, q: str, cidr: str) -> model.Whois:
        endpoints, more = await self._endpoints(pb.AddressesRequest(cidr=cidr))
        at_least = "at least " if more else ""
        says = (f"{cidr} holds {at_least}{_count(len(endpoints), 'announced address')}",)
        found = model.Whois(q, "cidr", says, (), endpoints, more)
        return await self._as_policies_see(await self._with_identities(found), cidr, "")

    async def _endpoint(self, q: str) -> model.Whois:
        endpoints, more = await self._endpoints(pb.AddressesRequest(endpoint=q))
        if not endpoints:
            raise NotFound(f"no endpoint {q!r} is announced; see GET /v1/identities")
        says = tuple(f"{one.ip} is {_endpoint_words(one)}" for one in endpoints)
        return await self._with_identities(model.Whois(q, "endpoint", says, (), endpoints, more))

    async def _name(self, q: str) -> model.Whois:
        """A node's, an endpoint's in any namespace, or a reserved one."""
        endpoints, more = await self._endpoints(pb.AddressesRequest(node=q))
        if endpoints:
            at_least = "at least " if more else ""
            count = _count(len(endpoints), "announced address")
            says: tuple[str, ...] = (f"{q} is a node with {at_least}{count}",)
            return await self._with_identities(model.Whois(q, "node", says, (), endpoints, more))
        endpoints, more = await self._endpoints(pb.AddressesRequest(endpoint=q))
        if endpoints:
            says = tuple(f"{one.ip} is {_endpoint_words(one)}" for one in endpoints)
            return await self._with_identities(
                model.Whois(q, "endpoint", says, (), endpoints, more)
            )
        return await self._reserved(q)

    async def _reserved(self, q: str) -> model.Whois:
        found: tuple[of_identities.Identity, ...] = ()
        if _NAME.fullmatch(q):
            found, _, _ = await self._identities.list(f"reserved:{q}", IDENTITIES, 0, 0)
        if not found:
            dns = _NO_DNS if "." in q else ""
            raise NotFound(f"{q!r} is no node, endpoint or reserved name{dns}; {_FORMS}")
        says = tuple(_identity_words(one) for one in found)
        return await self._with_policies(model.Whois(q, "name", says, found))

    # ------------------------------------------------------------------ what is added

    async def _endpoints(
        self, request: pb.AddressesRequest
    ) -> tuple[tuple[of_identities.Endpoint, ...], bool]:
        request.limit = ENDPOINTS
        return await self._identities.endpoints(request)

    async def _node_at(self, ip: str) -> str:
        """The node whose own address it is; empty for none."""
        hosted, _ = await self._identities.endpoints(pb.AddressesRequest(node=ip, limit=1))
        return hosted[0].node if hosted else ""

    async def _with_identities(self, found: model.Whois) -> model.Whois:
        numbers = list(dict.fromkeys(one.identity for one in found.endpoints))[:IDENTITIES]
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(self._known(number)) for number in numbers]
        known = tuple(task.result() for task in asked)
        identities = tuple(one for one in known if one is not None)
        return await self._with_policies(structs.replace(found, identities=identities))

    async def _known(self, number: int) -> of_identities.Identity | None:
        """None: collected while its address was still announced."""
        try:
            return await self._identities.get(number)
        except NotFound:
            return None

    async def _with_policies(self, found: model.Whois) -> model.Whois:
        unknown: list[str] = []
        policies: list[model.Selected] = []
        for one in found.identities:
            selected = await _or(self._selected(str(one.id)), None, unknown)
            if unknown:
                break
            if selected is not None:
                policies.append(selected[0])
        return structs.replace(found, policies=tuple(policies), unknown=(*found.unknown, *unknown))

    async def _selected(self, text: str) -> tuple[model.Selected, tuple[str, ...]] | None:
        try:
            return await self._selections.of(text)
        except NotFound:
            return None

    async def _as_policies_see(self, found: model.Whois, text: str, node: str) -> model.Whois:
        """Of what no endpoint has: a node's address, or something outside of the cluster."""
        unknown: list[str] = []
        seen = await _or(self._selected(text), None, unknown)
        says = list(found.says)
        if node:
            says.append(f"{text} is the address of node {node}")
        if seen is not None:
            selected, labels = seen
            named = " ".join(labels) or "no labels"
            says.append(f"to policies {text} is identity {selected.identity} ({named})")
        return structs.replace(found, says=tuple(says), unknown=(*found.unknown, *unknown))


def routes(backends: Backends) -> tuple[AnyRoute, ...]:
    on = WhoisHandlers(backends)
    return (
        Route(
            "GET", "/v1/whois", "Who an identity, address, CIDR, endpoint or node is",
            on.whois, WhoisQuery, model.Whois, raises=(NotFound, Invalid),
        ),
    )  # fmt: skip


def kind_of(q: str) -> str:
    """identity, address, cidr, endpoint or name."""
    if q.isascii() and q.isdecimal():
        return "identity"
    for kind, read in (("address", ip_address), ("cidr", _network)):
        try:
            read(q)
        except ValueError:
            continue
        return kind
    return "endpoint" if "/" in q else "name"


def _network(q: str) -> object:
    return ip_network(q, strict=False)


async def _or(asked: Awaitable[T], otherwise: T, unknown: list[str]) -> T:
    """What a service that may be away says; `otherwise`, and a word about it, when it is."""
    try:
        return await asked
    except Retry as error:
        unknown.append(str(error))
        return otherwise


def _identity_words(identity: of_identities.Identity) -> str:
    return f"identity {identity.id} ({identity.scope}): {' '.join(identity.labels) or 'no labels'}"


def _endpoint_words(endpoint: of_identities.Endpoint) -> str:
    who = f"endpoint {endpoint.namespace}/{endpoint.name}" if endpoint.name else "an address"
    return f"{who} of node {endpoint.node or endpoint.host_ip}, identity {endpoint.identity}"


def _count(count: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{count} {what}" + ("" if count == 1 else plural)
