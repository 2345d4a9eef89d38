"""/v1/status and /v1/nodes: how the cluster is, and how far its nodes are."""

from __future__ import annotations

from services.apid.backends import Backends
from services.apid.cluster import model
from services.apid.cluster.backend import Nodes
from services.apid.rest import pages
from services.apid.rest.params import Number, Paged, Timeout
from services.apid.rest.route import AnyRoute, Call, Nothing, Route
from services.runtime.errors import Retry
from services.runtime.health import OK


class WaitQuery(Nothing, frozen=True):
    revision: Number
    timeout_s: Timeout = 30.0


class ClusterHandlers:
    def __init__(self, backends: Backends) -> None:
        self._backends = backends
        self._nodes = Nodes(backends.policyd)

    async def status(self, _call: Call[Nothing]) -> model.Status:
        services = await self._backends.health()
        if services["policyd"] == OK:
            try:
                counts, nodes = await self._nodes.status()
                return model.Status(services, counts, nodes)
            except Retry as error:
                services["policyd"] = str(error)
        return model.Status(services, None, ())

    async def list_nodes(self, call: Call[Paged]) -> model.Nodes:
        counts, nodes = await self._nodes.status()
        shown, following = pages.page(call.takes, nodes, lambda node: (node.node,))
        return model.Nodes(shown, counts.revision, following)

    async def wait(self, call: Call[WaitQuery]) -> model.Realised:
        return await self._nodes.wait(call.takes.revision, call.takes.timeout_s)


def routes(backends: Backends) -> tuple[AnyRoute, ...]:
    on = ClusterHandlers(backends)
    return (
        Route(
            "GET", "/v1/status", "The services, what policyd holds, every node",
            on.status, Nothing, model.Status,
        ),
        Route(
            "GET", "/v1/nodes", "How far each node is",
            on.list_nodes, Paged, model.Nodes, items="nodes",
        ),
        Route(
            "GET", "/v1/policies/wait", "Until every node has realised `revision`, or the time-out",
            on.wait, WaitQuery, model.Realised,
        ),
    )  # fmt: skip
