"""The route table: every noun's own, in one order. A path without variables stands before one that
would match it too."""

from __future__ import annotations

from services.apid.backends import Backends
from services.apid.cluster import routes as cluster
from services.apid.identities import routes as identities
from services.apid.ipam import routes as ipam
from services.apid.policies import routes as policies
from services.apid.questions import routes as questions
from services.apid.rest.route import AnyRoute
from services.apid.whois import routes as whois


def table(backends: Backends) -> tuple[AnyRoute, ...]:
    return (
        *cluster.routes(backends),
        *identities.routes(backends),
        *whois.routes(backends),
        *questions.routes(backends),
        *policies.routes(backends),
        *ipam.routes(backends),
    )
