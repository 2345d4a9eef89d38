"""Endpoints that are to be, whenever their namespace is: one TOML file each, in a folder.

    namespace = "shop"
    name = "db"
    netns = "db"                 # or a path
    labels = ["k8s:app=db"]
    adopt = true                 # the interface is there already, with its address

The fields are those of a request for an endpoint. What was there before the agent comes under
policy this way, with the connections it has. A file that goes away deletes nothing.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Protocol

import msgspec

from datapath.agent.endpoints import Wanted
from datapath.agent.record import EndpointRecord
from datapath.agent.requests import EndpointRequest
from services.runtime.clock import Clock
from services.runtime.errors import Invalid, TesseraError
from services.runtime.log import logger

log = logger(__name__)

PAUSE_S = 2.0


class Endpoints(Protocol):
    @property
    def records(self) -> tuple[EndpointRecord, ...]: ...
    async def create(self, wanted: Wanted) -> EndpointRecord: ...


class Declared:
    def __init__(self, folder: Path, endpoints: Endpoints, clock: Clock) -> None:
        self._folder = folder
        self._endpoints = endpoints
        self._clock = clock
        self._told: dict[Path, str] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.once()
            await self._clock.sleep(PAUSE_S)

    async def once(self) -> None:
        """Makes what is missing. What cannot be made is said once, and tried again."""
        for path in sorted(self._folder.glob("*.toml")):
            try:
                wanted = read(path)
                if all(r.key != (wanted.namespace, wanted.name) for r in self._endpoints.records):
                    await self._endpoints.create(wanted)
                self._told.pop(path, None)
            except TesseraError as error:
                if self._told.get(path) != str(error):
                    self._told[path] = str(error)
                    log.warning("endpoint.undeclared", file=str(path), error=str(error))


def read(path: Path) -> Wanted:
    """Raises `Invalid`."""
    try:
        fields = tomllib.loads(path.read_text())
        return msgspec.convert(fields, EndpointRequest).wanted()
    except (OSError, ValueError) as error:  # of msgspec and tomllib, too
        raise Invalid(f"{path.name}: {error}") from None
