"""/v1/identities/watch: identityd's stream as server-sent events.

    listed* synced  (created | deleted | referenced | released | bookmark)*  [reset listed* ...]

Only the last event of a piece that identityd told as one carries an id, its revision: a client that
breaks off in the midst of a transaction hears the whole of it again, and misses none of it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from functools import lru_cache
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Raw, Struct
from tessera_wire.identity.v1 import queries_pb2 as pb

from services.apid.identities import model
from services.apid.identities.backend import Identities, labels_of
from services.apid.rest.errors import BAD_HEADER, Refusal
from services.apid.rest.params import Labels, Number
from services.apid.rest.route import Call, Event, Nothing

EVENTS: Final[dict[str, type[Struct]]] = {
    **dict.fromkeys(("listed", "created", "deleted", "referenced", "released"), model.Change),
    "synced": model.Told,
    "bookmark": model.Told,
    "reset": model.Reset,
}
_NAMES: Final = {number: name.lower() for name, number in pb.ChangeKind.items()}
# A burst of allocations, as told to many clients.
CHANGES_KEPT: Final = 4096
_FORGOTTEN: Final = "changes since the last event are forgotten; the list follows"


class WatchQuery(Nothing, frozen=True):
    labels: Labels = ""
    references: Annotated[
        bool, Meta(description="Also which nodes take and give back references.")
    ] = False
    since: Annotated[
        Number, Meta(description="Changes after this revision; 0: the list first.")
    ] = 0


class IdentityWatch:
    def __init__(self, identities: Identities) -> None:
        self._identities = identities

    async def watch(self, call: Call[WatchQuery]) -> AsyncGenerator[Event, None]:
        query = call.takes
        request = pb.WatchRequest(
            selector=query.labels,
            references=query.references,
            revision=_revision(call.last_event_id) or query.since,
        )
        return _events(await self._identities.watch(request))


def _revision(last_event_id: str) -> int:
    if not last_event_id:
        return 0
    if not (last_event_id.isascii() and last_event_id.isdecimal() and len(last_event_id) < 19):
        raise Refusal(
            BAD_HEADER, f"Last-Event-ID {last_event_id!r} is no id of this stream; begin without"
        )
    return int(last_event_id)


# Encoded once for all who watch.
@lru_cache(maxsize=CHANGES_KEPT)
def _body(number: int, labels: str, scope: str, node: str) -> Raw:
    return Raw(msgspec.json.encode(model.Change(number, labels_of(labels), scope, node)))


async def _events(
    pieces: AsyncGenerator[pb.WatchResponse, None],
) -> AsyncGenerator[Event, None]:
    try:
        async for piece in pieces:
            for event in _of_piece(piece):
                yield event
    finally:
        await pieces.aclose()


def _of_piece(piece: pb.WatchResponse) -> Iterator[Event]:
    at = str(piece.revision) if piece.revision else ""
    if piece.reset:
        yield Event("reset", model.Reset(_FORGOTTEN))
    last = len(piece.changes) - 1
    for index, change in enumerate(piece.changes):
        body = _body(change.id, change.labels, change.scope, change.node)
        yield Event(_NAMES[change.kind], body, at if index == last else "")
    if piece.synced:
        yield Event("synced", model.Told(piece.revision), at)
    elif at and not piece.changes:
        yield Event("bookmark", model.Told(piece.revision), at)
