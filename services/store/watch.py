"""Following prefixes of etcd: list at one revision, then watch from the next.

    pages at one revision ──► queue ──► Synced ──► watch from revision + 1 ──► queue ──► consumer
          ▲                                           │ stream broken: resume at last + 1
          └── compacted, or another cluster: relist, send the difference

The prefixes of one watch share one etcd watcher on the smallest range that holds them all, and what
lies between them is dropped here. Only so is the order of revisions across prefixes certain: etcd
keeps it per watcher, and separate watchers of one stream overtake each other when one falls behind.
A user restricted to some prefixes therefore watches each in a watch of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from enum import Enum
from typing import Final

from tessera_wire.etcd import etcd_pb2 as pb
from tessera_wire.etcd import kv_pb2

from services.runtime.errors import Retry, TesseraError, Unusable
from services.runtime.log import logger
from services.store.codec import key_bytes, key_text, key_value, start_bytes
from services.store.connection import STREAM_FAILURES, Connection
from services.store.faults import Compacted
from services.store.listing import PAGE_KEYS, Page, pages
from services.store.member import Member
from services.store.mirror import EventQueue, Mirror
from services.store.model import Changed, KeyValue, Removed, Revision, prefix_end
from services.store.stats import COUNTS

log = logger(__name__)

QUEUE_KEYS: Final = 20_000


class Watcher:
    """`run` feeds `queue` until cancelled. A failure that trying again cannot cure goes to the
    consumer through the queue."""

    def __init__(
        self, connection: Connection, prefixes: tuple[str, ...], page_keys: int = PAGE_KEYS
    ) -> None:
        self.queue = EventQueue(QUEUE_KEYS)
        self._connection = connection
        self._prefixes = _disjoint(prefixes)
        self._page_keys = page_keys
        self._mirror = Mirror()
        self._revision = Revision(0)  # the consumer's queue has everything up to here
        self._cluster = 0
        self._stage = _Stage.NEW
        self._synced = False
        self._failures = 0
        self._denied = False

    async def run(self) -> None:
        while True:
            member = self._connection.member
            try:
                if self._stage is not _Stage.LISTED:
                    await self._list()
                await self._follow(member)
            except Compacted as error:
                failure: TesseraError = Retry(str(error))
                self._stage = _Stage.BEHIND
                log.warning("watch.relisting", prefixes=self._prefixes, reason=str(error))
            except STREAM_FAILURES as error:
                failure = await self._connection.after_stream(member, error)
            if not isinstance(failure, Retry):
                self.queue.fail(failure)
                return
            self._failures += 1
            await self._connection.pause(self._failures, failure)

    async def _list(self) -> None:
        """The first time page by page into the queue; after that, or when the first time broke
        off, the difference to what the queue got."""
        first, self._stage = self._stage is _Stage.NEW, _Stage.BEHIND
        cluster, revision = self._cluster, self._revision
        found: list[KeyValue] = []
        async for page in self._pages():
            self._cluster, self._revision = page.cluster, page.revision
            if first:
                await self._deliver([Changed(item) for item in page.items])
            else:
                found += page.items
        if not first:
            COUNTS.relists += 1
            same_store = cluster == self._cluster and revision <= self._revision
            await self.queue.put(
                self._mirror.difference(found, self._revision, same_store=same_store)
            )
        self._stage = _Stage.LISTED
        if not self._synced:
            await self.queue.synced(self._revision)
            self._synced = True

    async def _pages(self) -> AsyncIterator[Page]:
        revision = Revision(0)
        for prefix in self._prefixes:
            async for page in pages(self._connection, prefix, revision, self._page_keys):
                revision = page.revision
                yield page

    async def _follow(self, member: Member) -> None:
        """Until the stream breaks; always ends in an exception."""
        call = member.watch.Watch(metadata=await self._connection.metadata())
        try:
            async with asyncio.timeout(self._connection.timeout_s):
                await call.write(self._request())
                created = _response(await call.read(), member)
            await self._check(created, member)
            self._connection.worked(member)
            COUNTS.resumes += self._failures > 0
            self._failures, self._denied = 0, False
            pending: list[kv_pb2.Event] = []
            while True:
                response = _response(await call.read(), member)
                self._connection.told(response.header)
                if response.canceled:
                    raise _cancellation(response, member)
                pending += response.events
                if not response.fragment:
                    await self._take(pending, response.header.revision)
                    pending = []
        finally:
            call.cancel()

    def _request(self) -> pb.WatchRequest:
        start = min(self._prefixes)
        ends = [prefix_end(prefix) for prefix in self._prefixes]
        return pb.WatchRequest(
            create_request=pb.WatchCreateRequest(
                key=start_bytes(start),
                range_end=key_bytes("\0" if "\0" in ends else max(ends)),
                start_revision=self._revision + 1,
                progress_notify=True,
                fragment=True,
            )
        )

    async def _check(self, created: pb.WatchResponse, member: Member) -> None:
        if created.canceled:
            # etcd 3.4 says "permission denied" for an expired login too.
            if not self._denied and await self._connection.renew_login():
                self._denied = True
                raise Retry(f"etcd at {member.server}: {created.cancel_reason}")
            raise _cancellation(created, member)
        if created.header.cluster_id != self._cluster:
            raise Compacted(f"etcd at {member.server} belongs to another cluster than before")
        if created.header.revision < self._revision:
            raise Compacted(f"etcd at {member.server} is behind what was already read")

    async def _take(self, events: list[kv_pb2.Event], revision: int) -> None:
        if not events:
            # A progress notice: all up to its revision was sent before it.
            self._revision = Revision(max(self._revision, revision))
            return
        starts = tuple(key_bytes(prefix) for prefix in self._prefixes)
        deleted = kv_pb2.Event.DELETE
        self._revision = Revision(events[-1].kv.mod_revision)
        await self._deliver(
            [
                Removed(key_text(event.kv.key), Revision(event.kv.mod_revision))
                if event.type == deleted
                else Changed(key_value(event.kv))
                for event in events
                if event.kv.key.startswith(starts)
            ]
        )

    async def _deliver(self, events: Sequence[Changed | Removed]) -> None:
        if events:
            self._mirror.apply(events)
            await self.queue.put(events)


class _Stage(Enum):
    NEW = "nothing listed yet"
    BEHIND = "history after the last event is lost"
    LISTED = "history after the last event is to be had"


def _disjoint(prefixes: tuple[str, ...]) -> tuple[str, ...]:
    """Without those that another one contains."""
    kept: list[str] = []
    for prefix in sorted(prefixes):
        if not kept or not prefix.startswith(kept[-1]):
            kept.append(prefix)
    return tuple(kept)


def _response(answer: object, member: Member) -> pb.WatchResponse:
    if not isinstance(answer, pb.WatchResponse):
        raise Retry(f"etcd at {member.server} closed the watch stream")
    return answer


def _cancellation(response: pb.WatchResponse, member: Member) -> TesseraError:
    if response.compact_revision:
        return Compacted(
            f"etcd at {member.server} has compacted its history up to {response.compact_revision}"
        )
    if "denied" in response.cancel_reason:
        return Unusable(
            f"etcd at {member.server}: {response.cancel_reason}; grant the user or certificate read"
            " on the whole range watched"
        )
    return Retry(f"etcd at {member.server} ended the watch: {response.cancel_reason}")
