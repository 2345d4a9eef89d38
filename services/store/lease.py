"""Keep-alives of all leases over one stream.

A lease is asked for at most once at a time; who asks meanwhile shares the answer. A stream that
breaks is opened anew, elsewhere, and what was unanswered is asked again: keep-alives repeat
harmlessly. Each caller waits no longer than the request timeout.
"""

from __future__ import annotations

import asyncio
from collections import deque

from tessera_wire.etcd import etcd_pb2 as pb

from services.runtime.errors import Retry, TesseraError
from services.runtime.tasks import Background
from services.store.connection import STREAM_FAILURES, Connection
from services.store.member import Member
from services.store.model import LeaseId
from services.store.stats import COUNTS


class KeepAlives:
    def __init__(self, connection: Connection, background: Background) -> None:
        self._connection = connection
        self._background = background
        self._waiting: dict[LeaseId, asyncio.Future[int | TesseraError]] = {}
        self._unsent: deque[LeaseId] = deque()
        self._asked = asyncio.Event()
        self._last_failure = ""
        self._failures = 0
        self._running = False

    async def renew(self, lease: LeaseId) -> int:
        """Remaining time in seconds, 0 when the lease is gone."""
        if not self._running:
            self._background.start(self._run(), name="lease keep-alives")
            self._running = True
        answer = self._waiting.get(lease)
        if answer is None:
            answer = asyncio.get_running_loop().create_future()
            self._waiting[lease] = answer
            self._unsent.append(lease)
            self._asked.set()
        try:
            async with asyncio.timeout(self._connection.timeout_s):
                outcome = await asyncio.shield(answer)
        except TimeoutError:
            server = self._connection.member.server
            late = f"etcd at {server} did not renew lease {lease:x} in time"
            raise Retry(self._last_failure or late) from None
        if isinstance(outcome, TesseraError):
            raise outcome
        COUNTS.leases_lost += outcome == 0
        return outcome

    async def _run(self) -> None:
        while True:
            await self._asked.wait()
            member = self._connection.member
            try:
                await self._converse(member)
            except STREAM_FAILURES as error:
                failure = await self._connection.after_stream(member, error)
            self._last_failure = str(failure)
            self._failures += 1
            if isinstance(failure, Retry):
                await self._connection.pause(self._failures, failure)
            else:
                for lease in tuple(self._waiting):
                    self._answer(lease, failure)

    async def _converse(self, member: Member) -> None:
        """Until the stream breaks; always ends in an exception."""
        call = member.lease.LeaseKeepAlive(metadata=await self._connection.metadata())
        self._unsent = deque(self._waiting)
        try:
            while True:
                await self._asked.wait()
                async with asyncio.timeout(self._connection.timeout_s):
                    while self._unsent:
                        await call.write(pb.LeaseKeepAliveRequest(ID=self._unsent.popleft()))
                    response = await call.read()
                if not isinstance(response, pb.LeaseKeepAliveResponse):
                    raise Retry(f"etcd at {member.server} closed the keep-alive stream")
                self._failures = 0
                self._last_failure = ""
                self._connection.worked(member)
                self._answer(LeaseId(response.ID), max(0, response.TTL))
        finally:
            call.cancel()

    def _answer(self, lease: LeaseId, outcome: int | TesseraError) -> None:
        answer = self._waiting.pop(lease, None)
        if answer is not None and not answer.done():
            answer.set_result(outcome)
        if not self._waiting:
            self._asked.clear()
