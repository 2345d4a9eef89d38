"""A small table of routes over plain values: what any route goes through, without a service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import msgspec

from services.apid.rest import pages
from services.apid.rest.params import Paged, Small
from services.apid.rest.route import AnyRoute, Body, Call, Event, Nothing, Route, Stream
from services.runtime.errors import NotFound, Retry


class Fruit(msgspec.Struct, frozen=True):
    name: str
    weight_g: int
    colours: tuple[str, ...] = ()


class Fruits(msgspec.Struct, frozen=True):
    fruits: tuple[Fruit, ...]
    next: str = ""


class FruitQuery(Paged, frozen=True, kw_only=True):
    colour: str = ""


class Numbered(Nothing, frozen=True):
    number: Small


class Tick(msgspec.Struct, frozen=True):
    """One tick."""

    count: int


class TickQuery(Nothing, frozen=True):
    upto: Small = 0
    fails: bool = False


@dataclass
class Orchard:
    """State is in plain attributes that a test reads and sets."""

    fruits: list[Fruit] = field(
        default_factory=lambda: [Fruit(name, 100) for name in ("apple", "lime", "pear", "plum")]
    )
    sent: list[Call] = field(default_factory=list)
    closed: int = 0
    last_event_ids: list[str] = field(default_factory=list)

    async def list_fruits(self, call: Call[FruitQuery]) -> Fruits:
        colour = call.takes.colour
        held = [one for one in self.fruits if not colour or colour in one.colours]
        return Fruits(*pages.page(call.takes, held, lambda one: (one.name,)))

    async def get_fruit(self, call: Call[Numbered]) -> Fruit:
        if call.takes.number >= len(self.fruits):
            raise NotFound(f"fruit {call.takes.number} does not exist")
        return self.fruits[call.takes.number]

    async def send_fruit(self, call: Call[Nothing]) -> Tick:
        self.sent.append(call)
        return Tick(len(self.sent))

    async def remove_fruit(self, call: Call[Numbered]) -> Tick:
        self.sent.append(call)
        return Tick(call.takes.number)

    async def ticks(self, call: Call[TickQuery]) -> AsyncGenerator[Event, None]:
        if call.takes.fails and not call.takes.upto:
            raise Retry("the clock is away; wind it up")
        self.last_event_ids.append(call.last_event_id)
        return self._ticking(int(call.last_event_id or 0), call.takes)

    async def _ticking(self, after: int, query: TickQuery) -> AsyncGenerator[Event, None]:
        try:
            for count in range(after + 1, query.upto + 1):
                yield Event("tick", Tick(count), str(count))
            if query.fails:
                raise Retry("the clock stopped; wind it up")
            await asyncio.Event().wait()
        finally:
            self.closed += 1

    def routes(self) -> tuple[AnyRoute, ...]:
        return (
            Route(
                "GET", "/v1/fruits", "All", self.list_fruits, FruitQuery, Fruits, items="fruits"
            ),
            Route(
                "POST", "/v1/fruits", "Send", self.send_fruit, Nothing, Tick,
                body=(Body("application/yaml"), Body("application/json", Fruit)),
            ),
            Route("GET", "/v1/fruits/{number}", "One", self.get_fruit, Numbered, Fruit),
            Route(
                "DELETE", "/v1/fruits/{number}", "Remove", self.remove_fruit, Numbered, Tick,
                guarded=True,
            ),
            Stream("/v1/ticks", "Ticks", self.ticks, TickQuery, {"tick": Tick}),
        )  # fmt: skip
