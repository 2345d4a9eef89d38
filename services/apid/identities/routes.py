"""/v1/identities: who the numbers are."""

from __future__ import annotations

from services.apid.backends import Backends
from services.apid.identities import model
from services.apid.identities.backend import Identities
from services.apid.rest import pages
from services.apid.rest.params import Chosen, Labels, Paged, Small
from services.apid.rest.route import AnyRoute, Call, Route
from services.runtime.errors import Invalid, NotFound


class IdentityQuery(Paged, frozen=True, kw_only=True):
    labels: Labels = ""


class IdentityPath(Chosen, frozen=True, kw_only=True):
    id: Small


class IdentityHandlers:
    def __init__(self, identities: Identities) -> None:
        self._identities = identities

    async def list_identities(self, call: Call[IdentityQuery]) -> model.Identities:
        query = call.takes
        after = pages.position(query, int) or 0
        found, last = await self._identities.list(query.labels, query.limit, after)
        return model.Identities(found, pages.cursor(query, last) if last else "")

    async def get_identity(self, call: Call[IdentityPath]) -> model.Identity:
        return await self._identities.get(call.takes.id)


def routes(backends: Backends) -> tuple[AnyRoute, ...]:
    on = IdentityHandlers(Identities(backends.identityd))
    return (
        Route(
            "GET", "/v1/identities", "Identities, by number",
            on.list_identities, IdentityQuery, model.Identities,
            items="identities", raises=(Invalid,),
        ),
        Route(
            "GET", "/v1/identities/{id}", "One identity",
            on.get_identity, IdentityPath, model.Identity, raises=(NotFound,),
        ),
    )  # fmt: skip
