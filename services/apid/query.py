"""Query parameters: declared per route, decoded once, everything else refused."""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from aiohttp import web
from msgspec import Meta

from services.apid.errors import BadRequest

Number = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Small = Annotated[int, Meta(ge=0, le=2**32 - 1)]
# Longer than an operator waits, shorter than a proxy's idle time-out.
Timeout = Annotated[float, Meta(ge=0, le=300)]

T = TypeVar("T", bound=msgspec.Struct)


class Nothing(msgspec.Struct, frozen=True):
    """No query parameters."""


def query_of(request: web.Request, kind: type[T]) -> T:
    """The parameters of a route are the fields of a struct; one without a default is required."""
    known = kind.__struct_fields__
    values: dict[str, str] = {}
    for name, text in request.query.items():
        if name not in known:
            takes = f"known: {', '.join(known)}" if known else "it takes none"
            raise BadRequest(f"query parameter {name!r} of {request.path} is unknown; {takes}")
        if name in values:
            raise BadRequest(f"query parameter {name!r} is given twice")
        values[name] = text
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(f"query of {request.path}: {error}") from error
