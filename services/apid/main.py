"""apid: the one REST door.

    operators, console --HTTP--> observed --> problems --> rest/serve.py --> a noun's routes.py
                                                                                    |
                                       identityd, ipamd, policyd <--gRPC-- its backend.py
Keeps no state. A backend that is away fails the requests that need it, and no others.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from aiohttp import web

from services.apid.app import application
from services.apid.backends import connected
from services.apid.routes import table
from services.runtime import process
from services.runtime.config import ApidConfig
from services.runtime.errors import Unusable
from services.runtime.log import logger
from services.wire.server import socket_path

log = logger(__name__)

# Under the grace the agents and the command line allow a stopping service.
_SHUTDOWN_S = 3.0


async def serve_until_stopped(config: ApidConfig) -> None:
    async with (
        connected(config) as backends,
        listening(application(table(backends)), config.listen) as address,
    ):
        log.info("apid.serving", listen=address)
        await asyncio.Event().wait()


@asynccontextmanager
async def listening(app: web.Application, listen: str) -> AsyncIterator[str]:
    """`listen`: "host:port" (port 0: any) or "unix:///path". Yields what a client dials."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_S)
    await runner.setup()
    try:
        site = _site(runner, listen)
        try:
            await site.start()
        except OSError as error:
            raise Unusable(
                f"apid cannot listen on {listen}: {error.strerror or error}; free it or set"
                " apid.listen"
            ) from None
        bound = runner.addresses[0]
        yield f"unix://{bound}" if isinstance(bound, str) else f"http://{bound[0]}:{bound[1]}"
    finally:
        await runner.cleanup()


def _site(runner: web.AppRunner, listen: str) -> web.BaseSite:
    if listen.startswith("unix:"):
        return web.UnixSite(runner, str(socket_path(listen)))
    host, _, port = listen.rpartition(":")
    if not (port.isascii() and port.isdecimal()):
        raise Unusable(f"apid.listen {listen!r} is neither host:port nor unix:///path")
    return web.TCPSite(runner, host.strip("[]") or None, int(port))


def main(argv: Sequence[str]) -> None:
    config = process.load_or_exit("apid", ApidConfig, argv)
    process.run("apid", config, partial(serve_until_stopped, config))


if __name__ == "__main__":
    main(sys.argv[1:])
