"""The web application: routes, spans, errors, /metrics and /healthz."""

from __future__ import annotations

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from services.apid.backends import Backends
from services.apid.errors import MAX_BODY_BYTES, Handler, problems
from services.apid.handlers import Handlers
from services.apid.openapi import document
from services.apid.routes import table
from services.runtime import health, metrics
from services.runtime.clock import Clock, SystemClock
from services.runtime.tracing import TRACEPARENT, span

_request_seconds = metrics.meter("tessera.apid").create_histogram(
    "tessera_apid_request_seconds", unit="s", description="REST requests by route and status"
)


def application(backends: Backends, clock: Clock | None = None) -> web.Application:
    observed = observer(clock or SystemClock())
    app = web.Application(middlewares=[observed, problems], client_max_size=MAX_BODY_BYTES)
    routes = table(Handlers(backends))
    described = msgspec.json.encode(document(routes))

    async def openapi(_request: web.Request) -> web.Response:
        return web.Response(body=described, content_type="application/json")

    for route in routes:
        app.router.add_route(route.method, route.path, route.handler)
    app.router.add_get("/v1/openapi.json", openapi)
    app.add_routes(health.routes())
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
