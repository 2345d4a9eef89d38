"""One simulated node: the agent's subscription, view, enforcement, acks and session, on tables in
memory, with endpoints that nobody sends a packet to.

    Session ──identities──► SimNode ──want──► Subscription ──► Enforcement ──► Tables.memory()
       ▲ announce ◄────────────┘ in force: add_endpoint
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final, Protocol

from datapath.agent.enforcement import Enforcement, Realised
from datapath.agent.record import NO_IDENTITY
from datapath.agent.session import Announced, Granted, Sets
from datapath.agent.subscribe import Decode, Door, Subscription
from datapath.agent.view import View
from datapath.maps.layout import Endpoint, EndpointFlags
from datapath.maps.tables import Sizes, Tables
from identity.numbers import NumericIdentity
from services.runtime.clock import Clock
from services.runtime.errors import TesseraError
from services.runtime.log import logger

log = logger(__name__)

# Policy of an identity that was just made comes with the next change; the store may be away.
POLICY_DEADLINE_S: Final = 60.0
AGAIN_S: Final = 2.0
_FLAGS: Final = EndpointFlags.READY


@dataclass(frozen=True, slots=True)
class SimEndpoint:
    """`address`: IPv4, in text."""

    name: str
    labels: tuple[str, ...]
    address: str
    namespace: str = "sim"


class Identities(Protocol):
    async def live(self) -> None: ...
    async def refer(self, sets: Sets) -> Mapping[tuple[str, ...], Granted | TesseraError]: ...
    async def announce(self, items: Sequence[Announced]) -> None: ...


class SimNode:
    """`on_realised` is told of every batch that is in the tables."""

    def __init__(
        self,
        name: str,
        ip: str,
        endpoints: Sequence[SimEndpoint],
        doors: Sequence[Door],
        *,
        identities: Identities,
        clock: Clock,
        jitter: random.Random,
        decode: Decode,
        sizes: Sizes | None = None,
        on_realised: Callable[[SimNode, Realised], None] = lambda node, realised: None,
    ) -> None:
        self.name = name
        self.ip = ip
        self.endpoints = endpoints
        self.tables = Tables.memory(sizes)
        self.enforcement = Enforcement(
            self.tables, View(), own_nodes=frozenset((name, ip)), allow_localhost=True
        )
        self.enforcement.recover({}, [int(IPv4Address(ip))])
        self._identities = identities
        self._clock = clock
        self.subscription = Subscription(
            doors,
            node=name,
            enforcement=self.enforcement,
            clock=clock,
            jitter=jitter,
            before=lambda: None,
            on_realised=lambda realised: on_realised(self, realised),
            decode=decode,
        )
        self.numbers: dict[str, NumericIdentity] = {}
        self.enforcing = False

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.subscription.run())
            group.create_task(self._bring_up())

    async def _bring_up(self) -> None:
        while not self.enforcing:
            try:
                await self._enforce()
            except TesseraError as error:
                log.warning("simnode.waiting", node=self.name, error=str(error))
                await self._clock.sleep(AGAIN_S)

    async def _enforce(self) -> None:
        await self._identities.live()
        await self._refer()
        for at, endpoint in enumerate(self.endpoints, start=1):
            self._add(at, endpoint)
        await self._announce()
        self.enforcing = True

    async def republish(self) -> None:
        """After a lost lease: references and announcements again."""
        if self.enforcing:
            await self._refer()
            for at, endpoint in enumerate(self.endpoints, start=1):
                self._add(at, endpoint)
            await self._announce()

    async def _refer(self) -> None:
        """Returns once every endpoint has a number whose policy is in force."""
        wanted = {e.labels: self.numbers.get(e.name, NO_IDENTITY) for e in self.endpoints}
        granted = await self._identities.refer(wanted)
        for endpoint in self.endpoints:
            answer, old = granted[endpoint.labels], self.numbers.get(endpoint.name)
            if isinstance(answer, TesseraError):
                raise answer
            if answer.number != old:
                self.subscription.want(answer.number)
                self.numbers[endpoint.name] = answer.number
                if old is not None:
                    self.subscription.unwant(old)
        for number in set(self.numbers.values()):
            await self.subscription.in_force(number, POLICY_DEADLINE_S)

    def _add(self, at: int, endpoint: SimEndpoint) -> None:
        number = self.numbers[endpoint.name]
        address = int(IPv4Address(endpoint.address))
        mac = b"\x02\x00" + address.to_bytes(4, "big")
        self.enforcement.add_endpoint(at, Endpoint(at, number, 0, 0, _FLAGS, address, mac, mac))

    async def _announce(self) -> None:
        await self._identities.announce(
            [
                Announced(e.address, self.numbers[e.name], e.namespace, e.name)
                for e in self.endpoints
            ]
        )
