"""Entity tags and the requests conditional on them (RFC 9110, 8.8.3 and 13).

A GET carries a strong tag of its body. If-None-Match on a GET saves the body (304); If-Match makes
a write depend on what its author has seen (412). A route that cannot heed If-Match refuses it: a
guard that is passed over is worse than none.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from aiohttp import web

from services.apid.rest.errors import BAD_HEADER, PRECONDITION_FAILED, Refusal

_TAGS = re.compile(r'\s*(?:(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"\s*(?:,\s*|$))+')
_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
_TAG_BYTES: Final = 12
ANY: Final = "*"
# The version of what does not exist.
NEW: Final = "0"


def tag_of(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=_TAG_BYTES).hexdigest()


def versioned(version: str, body: bytes) -> str:
    """A tag of an object with a version of its own: writes look at that alone, so that what only
    looks different (a count, a state) refuses none; reads at all of it."""
    return f"{version}.{tag_of(body)}"


def if_match(request: web.Request, *, guarded: bool) -> tuple[str, ...] | None:
    """For a route that writes: versions. None: unconditional, or `*`: an object that is not there
    fails by itself. (NEW,) for `If-None-Match: *`."""
    for header in ("If-Match", "If-None-Match"):
        if header in request.headers and not guarded:
            raise Refusal(
                BAD_HEADER,
                f"{request.method} {request.path} does not heed {header}; send it without",
            )
    absent = _tags(request, "If-None-Match", weak=True)
    if absent is not None:
        if absent != (ANY,) or "If-Match" in request.headers:
            raise Refusal(
                BAD_HEADER, f"{request.method} {request.path} takes If-None-Match: * alone"
            )
        return (NEW,)
    tags = _tags(request, "If-Match", weak=False)
    if tags is None or ANY in tags:
        return None
    return tuple(tag.partition(".")[0] for tag in tags)


def read(request: web.Request, body: bytes, etag: str) -> web.Response:
    """The answer to a GET, as its conditions want it."""
    wanted = _tags(request, "If-Match", weak=False)
    if wanted is not None and ANY not in wanted and etag not in wanted:
        raise Refusal(
            PRECONDITION_FAILED, f"{request.path} is now {etag}, which If-Match does not name"
        )
    held = _tags(request, "If-None-Match", weak=True)
    headers = {"ETag": f'"{etag}"', "Cache-Control": "no-cache"}
    if held is not None and (ANY in held or etag in held):
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, content_type="application/json", headers=headers)


def _tags(request: web.Request, header: str, *, weak: bool) -> tuple[str, ...] | None:
    """`weak`: compared weakly, so that weak tags count too."""
    if header not in request.headers:
        return None
    text = ",".join(request.headers.getall(header)).strip()
    if text == ANY:
        return (ANY,)
    if not _TAGS.fullmatch(text):
        raise Refusal(BAD_HEADER, f'{header}: {text!r} is not * nor entity tags such as "5f2a"')
    return tuple(tag for mark, tag in _TAG.findall(text) if weak or not mark)
