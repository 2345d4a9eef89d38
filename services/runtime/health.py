"""The listener for operators: /metrics for Prometheus, /healthz for whoever restarts processes.

/healthz answers 200 when every check passes, else 503, with the checks as JSON either way.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import msgspec
from aiohttp import web

from services.runtime import metrics
from services.runtime.errors import Unusable
from services.runtime.log import logger

log = logger(__name__)

OK: Final = "ok"

# Name of the check -> "ok", or what is wrong in one line.
Checks = Callable[[], Mapping[str, str]]


def no_checks() -> Mapping[str, str]:
    return {}


def routes(checks: Checks = no_checks) -> list[web.RouteDef]:
    """For a process that has an HTTP listener of its own."""

    async def healthz(_request: web.Request) -> web.Response:
        found = dict(checks())
        good = all(state == OK for state in found.values())
        body = {"status": OK if good else "failing", "checks": found}
        return web.Response(
            body=msgspec.json.encode(body),
            status=200 if good else 503,
            content_type="application/json",
        )

    async def metrics_text(_request: web.Request) -> web.Response:
        return web.Response(
            body=metrics.exposition(), headers={"Content-Type": metrics.CONTENT_TYPE}
        )

    return [web.get("/healthz", healthz), web.get("/metrics", metrics_text)]


@asynccontextmanager
async def serve_metrics(listen: str, checks: Checks = no_checks) -> AsyncIterator[str]:
    """Serve while inside; yields the address bound, host:port. Port 0 picks one; an empty `listen`
    serves nothing."""
    if not listen:
        yield ""
        return
    host, _, port = listen.rpartition(":")
    if not port.isdecimal():
        raise Unusable(f"metrics_listen {listen!r} is not host:port")
    app = web.Application()
    app.add_routes(routes(checks))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host.strip("[]") or None, int(port))
        try:
            await site.start()
        except OSError as error:
            reason = error.strerror or error
            raise Unusable(f"metrics_listen {listen}: {reason}; choose another port") from None
        bound = runner.addresses[0]
        yield f"{bound[0]}:{bound[1]}"
    finally:
        await runner.cleanup()
