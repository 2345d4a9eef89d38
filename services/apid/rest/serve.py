"""A route made into a handler of aiohttp: everything a request goes through besides its meaning.

Accept? ─► path and query ─► conditions ─► body, its type ─► handler ─► fields ─► ETag, 304
 406        404, 400          400           415, 413                                  412
"""

from __future__ import annotations

import re
from typing import Any, Final

from aiohttp import web

from services.apid.rest import conditional
from services.apid.rest.errors import BAD_MEDIA_TYPE, NOT_ACCEPTABLE, Handler, Refusal
from services.apid.rest.fields import chosen_of, encoded
from services.apid.rest.params import Chosen, takes_of
from services.apid.rest.route import Answer, AnyRoute, Call, Route, Stream
from services.apid.rest.sse import EVENT_STREAM, Streams

JSON: Final = "application/json"
_READS: Final = ("GET", "HEAD")
# What editors and libraries call YAML besides its registered name (RFC 9512).
_ALIASES: Final = {
    "text/yaml": "application/yaml",
    "text/x-yaml": "application/yaml",
    "application/x-yaml": "application/yaml",
}
_QUALITY = re.compile(r"q\s*=\s*([01](?:\.\d{0,3})?)", re.IGNORECASE)


def serving(route: AnyRoute, streams: Streams) -> Handler:
    match route:
        case Stream():
            return _streaming(route, streams)
        case Route():
            return _answering(route)


def _answering(route: Route[Any]) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        _negotiate(request, JSON)
        takes = takes_of(request, route)
        names = chosen_of(route, takes.fields) if isinstance(takes, Chosen) else ()
        guard = None
        if request.method not in _READS:
            guard = conditional.if_match(request, guarded=route.guarded)
        kind, body = await _body(request, route)
        answer = await route.handler(Call(takes, body, kind, guard))
        given = answer.body if isinstance(answer, Answer) else answer
        content = encoded(given, route.items, names)
        if request.method not in _READS:
            return web.Response(body=content, content_type=JSON)
        etag = conditional.tag_of(content)
        if isinstance(answer, Answer):
            etag = conditional.versioned(answer.version, content)
        response = conditional.read(request, content, etag)
        if following := getattr(given, "next", ""):
            page = request.rel_url.update_query(cursor=following)
            response.headers["Link"] = f'<{page}>; rel="next"'
        return response

    return handle


def _streaming(route: Stream[Any], streams: Streams) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        _negotiate(request, EVENT_STREAM)
        takes = takes_of(request, route)
        last = request.headers.get("Last-Event-ID", "")
        return await streams.serve(request, await route.handler(Call(takes, last_event_id=last)))

    return handle


async def _body(request: web.Request, route: Route[Any]) -> tuple[str, bytes]:
    """(content type, body) of a route that reads one; others ignore what is sent."""
    if not route.body:
        return "", b""
    taken = [one.content_type for one in route.body]
    kind = taken[0]
    if "Content-Type" in request.headers:
        kind = _ALIASES.get(request.content_type, request.content_type)
    if kind not in taken:
        raise Refusal(
            BAD_MEDIA_TYPE,
            f"{request.method} {request.path} takes {' or '.join(taken)}, not {kind};"
            f" send it with Content-Type: {taken[0]}",
            {"Accept-Post" if request.method == "POST" else "Accept": ", ".join(taken)},
        )
    return kind, await request.read()


def _negotiate(request: web.Request, offered: str) -> None:
    accept = ",".join(request.headers.getall("Accept", ())).strip()
    if accept and _quality(accept, offered) == 0:
        raise Refusal(NOT_ACCEPTABLE, f"{request.path} answers {offered}; Accept is {accept!r}")


def _quality(accept: str, offered: str) -> float:
    """Of the most specific range that fits (RFC 9110, 12.5.1)."""
    ranges = {"*/*": 0, f"{offered.partition('/')[0]}/*": 1, offered: 2}
    best, found = -1, 0.0
    for part in accept.split(","):
        kind, _, rest = part.strip().lower().partition(";")
        rank = ranges.get(kind.strip(), -1)
        if rank > best:
            quality = _QUALITY.search(rest)
            best, found = rank, float(quality[1]) if quality else 1.0
    return found
