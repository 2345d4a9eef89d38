"""The web application: routes, spans, errors, /metrics and /healthz."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from services.apid.rest import conditional
from services.apid.rest.errors import MAX_BODY_BYTES, Handler, problems
from services.apid.rest.openapi import document
from services.apid.rest.route import AnyRoute, Route
from services.apid.rest.serve import serving
from services.apid.rest.sse import KEEP_ALIVE_S, Streams
from services.runtime import health, metrics
from services.runtime.clock import Clock, SystemClock
from services.runtime.tracing import TRACEPARENT, span

_request_seconds = metrics.meter("tessera.apid").create_histogram(
    "tessera_apid_request_seconds", unit="s", description="REST requests by route and status"
)


def application(
    routes: Sequence[AnyRoute], clock: Clock | None = None, *, keep_alive_s: float = KEEP_ALIVE_S
) -> web.Application:
    """Serves `routes`, and the document made from them."""
    observed = observer(clock or SystemClock())
    app = web.Application(middlewares=[observed, problems], client_max_size=MAX_BODY_BYTES)
    streams = Streams(keep_alive_s)
    described = msgspec.json.encode(document(routes))

    async def openapi(request: web.Request) -> web.Response:
        return conditional.read(request, described, conditional.tag_of(described))

    for route in routes:
        handler = serving(route, streams)
        app.router.add_route(route.method, route.path, handler)
        if isinstance(route, Route) and route.method == "GET":
            app.router.add_route("HEAD", route.path, handler)
    app.router.add_get("/v1/openapi.json", openapi)
    app.add_routes(health.routes())
    app.on_shutdown.append(streams.stop)
    return app


def observer(clock: Clock) -> Middleware:
    @web.middleware
    async def observed(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Continues the trace of the request's traceparent; named by the route, not by the path."""
        resource = request.match_info.route.resource
        name = resource.canonical if resource is not None else "unknown path"
        started_s = clock.monotonic_s()
        with span(f"{request.method} {name}", request.headers.get(TRACEPARENT)) as current:
            response = await handler(request)
            current.set_attribute("http.response.status_code", response.status)
        took_s = clock.monotonic_s() - started_s
        _request_seconds.record(
            took_s, {"method": request.method, "route": name, "status": response.status}
        )
        return response

    return observed
