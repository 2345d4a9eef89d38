"""What a route is: a path, what it takes, what it answers and how it refuses. Serving (serve.py)
and the OpenAPI document (openapi.py) are both made from it, so neither differs from the other.

    Route(...)    one request, one JSON body
    Stream(...)   one request, server-sent events until either end goes
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec

from services.apid.rest.errors import Problem
from services.runtime.errors import TesseraError

T = TypeVar("T", bound=msgspec.Struct)

_VARIABLE: Final = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request as its handler sees it.

    `takes` holds path variables and query. `content_type` is one of the route's. `if_match`:
    versions, of which the object must have one ("0": it must not exist); None: any will do.
    `last_event_id`: where a stream goes on.
    """

    takes: T
    body: bytes = b""
    content_type: str = ""
    if_match: tuple[str, ...] | None = None
    last_event_id: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A body that has a version, which a write may insist on by If-Match."""

    body: msgspec.Struct
    version: str


@dataclass(frozen=True, slots=True)
class Event:
    """`id`: where a client that has seen this one goes on; empty: where it would have before.
    `data` Raw: encoded already, for many clients at once."""

    name: str
    data: msgspec.Struct | msgspec.Raw
    id: str = ""


@dataclass(frozen=True, slots=True)
class Body:
    """`schema` None: the content is described by its type alone."""

    content_type: str
    schema: type[msgspec.Struct] | None = None
    example: str = ""


@dataclass(frozen=True, slots=True)
class Route(Generic[T]):
    """`takes`: a struct with a field for each variable of the path, the rest are query parameters;
    one without a default is required.

    `items`: the field of the answer that is the list; `fields=` chooses within its objects.
    `body`: what may be sent; a request without a Content-Type means the first. `raises`: what the
    handler refuses with, besides what any route does. `guarded`: the handler heeds `if_match`.
    """

    method: str
    path: str
    summary: str
    handler: Callable[[Call[T]], Awaitable[msgspec.Struct | Answer]]
    takes: type[T]
    answer: type[msgspec.Struct]
    items: str = ""
    body: tuple[Body, ...] = ()
    raises: tuple[type[TesseraError], ...] = ()
    refusal: type[Problem] = Problem
    guarded: bool = False
    example: msgspec.Struct | None = None


@dataclass(frozen=True, slots=True)
class Stream(Generic[T]):
    """The handler's awaitable ends once the source is known to be good: what it raises has a
    status. What the generator raises later becomes a `problem` event, the last one."""

    path: str
    summary: str
    handler: Callable[[Call[T]], Awaitable[AsyncGenerator[Event, None]]]
    takes: type[T]
    events: Mapping[str, type[msgspec.Struct]]
    raises: tuple[type[TesseraError], ...] = ()

    method: str = "GET"


# The handler's parameter ties `takes` to its route; a table of routes has no use for it.
AnyRoute = Route[Any] | Stream[Any]


class Nothing(msgspec.Struct, frozen=True):
    """No variable in the path and no query parameter."""


def variables(path: str) -> tuple[str, ...]:
    return tuple(_VARIABLE.findall(path))
