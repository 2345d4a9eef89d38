"""Path variables and query parameters: declared per route, decoded once, all else refused."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from aiohttp import web
from msgspec import Meta

from services.apid.rest.errors import BAD_QUERY, Refusal
from services.apid.rest.route import AnyRoute, variables
from services.runtime.errors import NotFound

PAGE: Final = 500
MAX_PAGE: Final = 10_000

Number = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Small = Annotated[int, Meta(ge=0, le=2**32 - 1)]
# Longer than an operator waits, shorter than a proxy's idle time-out.
Timeout = Annotated[float, Meta(ge=0, le=300, description="Seconds.")]
Fields = Annotated[
    str, Meta(description="Only these fields of each object, joined by commas.", examples=[""])
]
Labels = Annotated[
    str,
    Meta(
        description="Label selector: key, !key, key=value, key!=value, key in (a,b),"
        " key notin (a,b), joined by commas; a key may name its source, as in k8s:app.",
        examples=["app=web,tier in (front,back),!canary"],
    ),
]
Limit = Annotated[int, Meta(ge=1, le=MAX_PAGE, description="Objects on a page.")]
Cursor = Annotated[
    str, Meta(description="`next` of the page before; empty for the first.", examples=[""])
]


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """A list that is short, in one answer."""

    fields: Fields = ""


class Paged(Chosen, frozen=True, kw_only=True):
    """A list that grows, page by page."""

    limit: Limit = PAGE
    cursor: Cursor = ""


def takes_of(request: web.Request, route: AnyRoute) -> msgspec.Struct:
    """Raises `NotFound` for a variable of the path that cannot be one of its kind."""
    in_path = variables(route.path)
    known = [name for name in route.takes.__struct_fields__ if name not in in_path]
    values: dict[str, str] = {}
    for name, text in request.query.items():
        if name not in known:
            known_are = f"known: {', '.join(known)}" if known else "it takes none"
            raise Refusal(
                BAD_QUERY, f"query parameter {name!r} of {request.path} is unknown; {known_are}"
            )
        if name in values:
            raise Refusal(BAD_QUERY, f"query parameter {name!r} is given twice")
        values[name] = text
    values |= request.match_info
    try:
        takes: msgspec.Struct = msgspec.convert(values, route.takes, strict=False)
    except msgspec.ValidationError as error:
        words = str(error)
        at = next((name for name in in_path if f"`$.{name}`" in words), None)
        if at is not None:
            raise NotFound(f"{request.path}: {at} {values[at]!r} is none: {words}") from error
        raise Refusal(BAD_QUERY, f"query of {request.path}: {words}") from error
    return takes
