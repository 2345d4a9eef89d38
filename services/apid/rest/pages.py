"""Cursors: where a list goes on, opaque to clients.

A cursor names the last object given, not a count, so that what comes and goes meanwhile moves
nothing: an object there throughout is listed once. It belongs to one path and one query, and says
so when it is used with another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

import msgspec

from services.apid.rest.errors import BAD_CURSOR, Refusal
from services.apid.rest.params import Paged

T = TypeVar("T")
K = TypeVar("K")

_QUERY_BYTES: Final = 6
_PAGING: Final = frozenset({"limit", "cursor", "fields"})


class _Cursor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    query: bytes
    position: msgspec.Raw


def cursor(query: Paged, position: object) -> str:
    """`position`: what msgpack can hold."""
    body = _Cursor(_digest(query), msgspec.Raw(msgspec.msgpack.encode(position)))
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(body)).decode().rstrip("=")


def position(query: Paged, kind: type[K]) -> K | None:
    """None: from the beginning. Raises `Refusal` for a cursor that `query` was not given."""
    if not query.cursor:
        return None
    try:
        padded = query.cursor + "=" * (-len(query.cursor) % 4)
        found = msgspec.msgpack.decode(
            base64.b64decode(padded, altchars=b"-_", validate=True), type=_Cursor
        )
        at = msgspec.msgpack.decode(found.position, type=kind)
    except (binascii.Error, ValueError, msgspec.DecodeError) as error:
        raise Refusal(
            BAD_CURSOR, "cursor: it is not one that this server gave; begin without"
        ) from error
    if found.query != _digest(query):
        raise Refusal(
            BAD_CURSOR, "cursor: it belongs to a list with other parameters; begin without"
        )
    return at


def page(
    query: Paged, items: Iterable[T], key: Callable[[T], tuple[str, ...]]
) -> tuple[tuple[T, ...], str]:
    """A page of `items`, which are ascending by `key`, and the cursor of the next or ""."""
    after = position(query, tuple[str, ...])
    rest = [item for item in items if after is None or key(item) > after]
    shown = tuple(rest[: query.limit])
    more = len(rest) > len(shown)
    return shown, cursor(query, key(shown[-1])) if more else ""


def _digest(query: Paged) -> bytes:
    """Of everything that decides what is in the list."""
    names = (name for name in query.__struct_fields__ if name not in _PAGING)
    chosen = [type(query).__name__, *((name, getattr(query, name)) for name in names)]
    return hashlib.blake2b(msgspec.msgpack.encode(chosen), digest_size=_QUERY_BYTES).digest()
