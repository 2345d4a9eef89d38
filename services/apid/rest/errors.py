"""Exceptions to HTTP, the only place: application/problem+json (RFC 9457) for everything not 2xx.

    Invalid 422   NotFound 404   Conflict 409   Exhausted 507   Retry 503   Unusable 501

`type` is what a program branches on; it never changes its meaning. What a backend said is passed on
in its own words as `detail`. The CLI turns the problems back into the same exceptions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import msgspec
from aiohttp import web

from services.runtime.errors import (
    Conflict,
    Exhausted,
    Invalid,
    NotFound,
    Retry,
    TesseraError,
    Unusable,
)
from services.runtime.log import logger

log = logger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MAX_BODY_BYTES: Final = 8 << 20
PROBLEM_JSON: Final = "application/problem+json"
# What a client may wait before it tries again.
_RETRY_AFTER_S: Final = "1"
_NO_HEADERS: Final[Mapping[str, str]] = {}


@dataclass(frozen=True, slots=True)
class Kind:
    """A problem type: one status, and one meaning for ever."""

    slug: str
    status: HTTPStatus
    title: str

    @property
    def type(self) -> str:
        return f"urn:tessera:problem:{self.slug}"


BAD_QUERY: Final = Kind(
    "bad-query", HTTPStatus.BAD_REQUEST, "A query parameter is unknown or cannot be read"
)
BAD_HEADER: Final = Kind("bad-header", HTTPStatus.BAD_REQUEST, "A request header cannot be read")
BAD_BODY: Final = Kind("bad-body", HTTPStatus.BAD_REQUEST, "The body cannot be read")
BAD_CURSOR: Final = Kind(
    "bad-cursor", HTTPStatus.BAD_REQUEST, "The cursor is none that this list gave"
)
NOT_FOUND: Final = Kind("not-found", HTTPStatus.NOT_FOUND, "There is no such object")
UNKNOWN_PATH: Final = Kind("unknown-path", HTTPStatus.NOT_FOUND, "There is no such path")
BAD_METHOD: Final = Kind(
    "method-not-allowed", HTTPStatus.METHOD_NOT_ALLOWED, "The path does not take this method"
)
NOT_ACCEPTABLE: Final = Kind(
    "not-acceptable", HTTPStatus.NOT_ACCEPTABLE, "The answer has no form that Accept allows"
)
CONFLICT: Final = Kind("conflict", HTTPStatus.CONFLICT, "Somebody else was first")
CURSOR_EXPIRED: Final = Kind(
    "cursor-expired", HTTPStatus.GONE, "The list has moved on too far for this cursor"
)
PRECONDITION_FAILED: Final = Kind(
    "precondition-failed",
    HTTPStatus.PRECONDITION_FAILED,
    "The object is not as the request demands it",
)
TOO_LARGE: Final = Kind(
    "too-large", HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The body is larger than the server takes"
)
BAD_MEDIA_TYPE: Final = Kind(
    "unsupported-media-type", HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "The body has a foreign type"
)
INVALID: Final = Kind("invalid", HTTPStatus.UNPROCESSABLE_ENTITY, "The input is refused")
INTERNAL: Final = Kind(
    "internal", HTTPStatus.INTERNAL_SERVER_ERROR, "The server has a defect; its log says more"
)
UNUSABLE: Final = Kind(
    "unusable", HTTPStatus.NOT_IMPLEMENTED, "A service lacks what the request needs"
)
UNAVAILABLE: Final = Kind(
    "unavailable", HTTPStatus.SERVICE_UNAVAILABLE, "A service does not answer; try again"
)
EXHAUSTED: Final = Kind("exhausted", HTTPStatus.INSUFFICIENT_STORAGE, "A bounded thing is full")

KINDS: Final = (
    BAD_QUERY, BAD_HEADER, BAD_BODY, BAD_CURSOR, NOT_FOUND, UNKNOWN_PATH, BAD_METHOD,
    NOT_ACCEPTABLE, CONFLICT, CURSOR_EXPIRED, PRECONDITION_FAILED, TOO_LARGE, BAD_MEDIA_TYPE,
    INVALID, INTERNAL, UNUSABLE, UNAVAILABLE, EXHAUSTED,
)  # fmt: skip

KIND_OF: Final[dict[type[TesseraError], Kind]] = {
    Invalid: INVALID,
    NotFound: NOT_FOUND,
    Conflict: CONFLICT,
    Unusable: UNUSABLE,
    Exhausted: EXHAUSTED,
    Retry: UNAVAILABLE,
}


class Problem(msgspec.Struct, frozen=True):
    """RFC 9457. `type` says which mistake it is, `detail` what happened and what would fix it."""

    type: str
    title: str
    status: int
    detail: str


class Refusal(Exception):
    """The REST layer itself refuses. `body`: a Problem with more in it than kind and detail say."""

    def __init__(
        self,
        kind: Kind,
        detail: str,
        headers: Mapping[str, str] = _NO_HEADERS,
        body: Problem | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.headers = headers
        self.body = body


def told(error: Exception, what: str) -> Problem:
    """What a client is told of `error`. What nobody foresaw goes to the log, once."""
    match error:
        case Refusal():
            return error.body or _problem(error.kind, error.detail)
        case TesseraError():
            kind = next(kind for cls, kind in KIND_OF.items() if isinstance(error, cls))
            return _problem(kind, str(error))
        case _:
            log.error("rest.failed", name=what, exc_info=error)
            detail = f"internal error ({type(error).__name__}); see the log of apid"
            return _problem(INTERNAL, detail)


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _of_aiohttp(error, request)
    except Exception as error:  # noqa: BLE001 - the boundary: whatever it is, the client is told
        headers = error.headers if isinstance(error, Refusal) else _NO_HEADERS
        return _response(told(error, f"{request.method} {request.path}"), headers)


def _of_aiohttp(error: web.HTTPException, request: web.Request) -> web.Response:
    headers: dict[str, str] = {}
    match error:
        case web.HTTPRequestEntityTooLarge():
            kind = TOO_LARGE
            detail = f"the body is larger than {MAX_BODY_BYTES} bytes; send it in several requests"
        case web.HTTPNotFound():
            kind = UNKNOWN_PATH
            detail = f"{request.path} is not a path of this server; see /v1/openapi.json"
        case web.HTTPMethodNotAllowed(allowed_methods=allowed):
            kind = BAD_METHOD
            headers["Allow"] = ", ".join(sorted(allowed))
            detail = f"{request.path} takes {headers['Allow']}, not {request.method}"
        case _:
            kind, detail = BAD_HEADER, error.reason
    return _response(_problem(kind, detail), headers)


def _problem(kind: Kind, detail: str) -> Problem:
    return Problem(kind.type, kind.title, kind.status, detail)


def _response(body: Problem, headers: Mapping[str, str] = _NO_HEADERS) -> web.Response:
    response = web.Response(
        body=msgspec.json.encode(body),
        status=body.status,
        content_type=PROBLEM_JSON,
        headers={"Cache-Control": "no-store", **headers},
    )
    if body.status == UNAVAILABLE.status:
        response.headers["Retry-After"] = _RETRY_AFTER_S
    return response
