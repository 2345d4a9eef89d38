"""The route table: each path once, with what it takes and answers; serving and the OpenAPI document
are both made from it."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from services.apid import handlers, model
from services.apid.errors import Handler
from services.apid.handlers import Handlers
from services.apid.query import Nothing


@dataclass(frozen=True, slots=True)
class Route:
    """`body`: content type -> what it means, for a route that reads one."""

    method: str
    path: str
    summary: str
    handler: Handler
    query: type[msgspec.Struct]
    answer: type[msgspec.Struct]
    body: tuple[tuple[str, type[msgspec.Struct] | None], ...] = ()


_MANIFESTS = (("application/yaml", None), ("application/json", None))
_NAMES = (("application/yaml", None), ("application/json", model.Refs))


def table(on: Handlers) -> tuple[Route, ...]:
    """A path without variables stands before one that would match it too."""
    return (
        Route(
            "GET", "/v1/status", "The services, what policyd holds, every node",
            on.status, Nothing, model.Status,
        ),
        Route(
            "GET", "/v1/nodes", "How far each node is",
            on.nodes, Nothing, model.Nodes,
        ),
        Route(
            "GET", "/v1/identities", "Identities, by number; `labels` is a selector",
            on.identities, handlers.IdentityQuery, model.Identities,
        ),
        Route(
            "GET", "/v1/identities/{id}", "One identity",
            on.identity, Nothing, model.Identity,
        ),
        Route(
            "GET", "/v1/policies/wait", "Until every node has realised `revision`, or the time-out",
            on.wait, handlers.WaitQuery, model.Realised,
        ),
        Route(
            "GET", "/v1/policies", "Policies as they were applied, with their state",
            on.policies, handlers.PolicyQuery, model.StoredPolicies,
        ),
        Route(
            "POST", "/v1/policies", "Apply all documents, or none of them",
            on.apply, handlers.ApplyQuery, model.Applied, _MANIFESTS,
        ),
        Route(
            "POST", "/v1/policies/delete", "Delete what is named, by documents or references",
            on.delete_policies, handlers.DeleteQuery, model.Deleted, _NAMES,
        ),
        Route(
            "DELETE", "/v1/policies/{kind}/{namespace}/{name}", "Delete one; _ for no namespace",
            on.delete_policy, handlers.AuthorQuery, model.Deleted,
        ),
        Route(
            "GET", "/v1/ipam/pools", "Address pools and their use",
            on.pools, Nothing, model.Pools,
        ),
        Route(
            "GET", "/v1/ipam/blocks", "Which node holds which block",
            on.blocks, handlers.BlockQuery, model.Blocks,
        ),
        Route(
            "GET", "/v1/ipam/addresses", "Addresses and their owners",
            on.addresses, handlers.AddressQuery, model.Addresses,
        ),
    )  # fmt: skip
