"""Exceptions to HTTP, the only place: application/problem+json (RFC 9457) for everything not 2xx.

    Invalid 422   NotFound 404   Conflict 409   Unusable 412   Exhausted 507   Retry 503

What a backend said is passed on in its own words. The CLI turns the statuses back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final

import msgspec
from aiohttp import web

from services.apid.model import Problem, Refused
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

STATUS_OF: Final[dict[type[TesseraError], HTTPStatus]] = {
    Invalid: HTTPStatus.UNPROCESSABLE_ENTITY,
    NotFound: HTTPStatus.NOT_FOUND,
    Conflict: HTTPStatus.CONFLICT,
    Unusable: HTTPStatus.PRECONDITION_FAILED,
    Exhausted: HTTPStatus.INSUFFICIENT_STORAGE,
    Retry: HTTPStatus.SERVICE_UNAVAILABLE,
}
MAX_BODY_BYTES: Final = 8 << 20

_PROBLEM_JSON: Final = "application/problem+json"
# What a client may wait before it tries again.
_RETRY_AFTER_S: Final = "1"


class BadRequest(Exception):
    """The request itself is malformed: a query parameter that does not exist, say."""


def problem(status: HTTPStatus, detail: str) -> web.Response:
    return _response(status, Problem(status.phrase, status, detail))


def refused(body: Refused) -> web.Response:
    return _response(HTTPStatus(body.status), body)


@web.middleware
async def problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except TesseraError as error:
        return problem(_status_of(error), str(error))
    except BadRequest as error:
        return problem(HTTPStatus.BAD_REQUEST, str(error))
    except web.HTTPException as error:
        return _of_aiohttp(error, request)
    except Exception as error:  # the boundary: whatever it is, the client gets an answer
        log.exception("rest.failed", name=f"{request.method} {request.path}")
        detail = f"internal error ({type(error).__name__}); see the log of apid"
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, detail)


def _status_of(error: TesseraError) -> HTTPStatus:
    return next(status for kind, status in STATUS_OF.items() if isinstance(error, kind))


def _of_aiohttp(error: web.HTTPException, request: web.Request) -> web.Response:
    status = HTTPStatus(error.status)
    match error:
        case web.HTTPRequestEntityTooLarge():
            detail = f"the body is larger than {MAX_BODY_BYTES} bytes; send it in several requests"
        case web.HTTPNotFound():
            detail = f"{request.path} is not a path of this server; see /v1/openapi.json"
        case web.HTTPMethodNotAllowed(allowed_methods=allowed):
            detail = f"{request.path} takes {', '.join(sorted(allowed))}, not {request.method}"
        case _:
            detail = error.reason
    response = problem(status, detail)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def _response(status: HTTPStatus, body: Problem | Refused) -> web.Response:
    response = web.Response(
        body=msgspec.json.encode(body), status=status, content_type=_PROBLEM_JSON
    )
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        response.headers["Retry-After"] = _RETRY_AFTER_S
    return response
