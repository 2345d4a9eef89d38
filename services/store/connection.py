"""The way to etcd: endpoints, which of them is in use, TLS, login, and when to try again.

One channel per endpoint, one of them in use (shuffled, then sticky) until it fails; then the next.
A request is sent again when it only reads, or when no server has acted on it; a write whose outcome
is unknown is the caller's to re-read.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

import grpc
from grpc.aio import Metadata, UnaryUnaryMultiCallable
from tessera_wire.etcd import etcd_pb2 as pb

from services.runtime.clock import Clock
from services.runtime.config import EtcdConfig
from services.runtime.errors import Retry, TesseraError, Unusable
from services.runtime.log import logger
from services.store.faults import StaleToken, Unsent, translate
from services.store.member import Member, members
from services.store.stats import COUNTS, TIMED_EVERY, call_seconds

log = logger(__name__)

FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 5.0

# Members cut off from the majority answer at once instead of letting the call hang.
REQUIRE_LEADER: Final = ("hasleader", "true")

# What a stream's read or write ends in; InvalidStateError is grpc.aio's word for writing to a call
# that is over.
STREAM_FAILURES: Final = (
    grpc.aio.AioRpcError,
    TimeoutError,
    asyncio.InvalidStateError,
    TesseraError,
)


class _Answer(Protocol):
    @property
    def header(self) -> pb.ResponseHeader: ...


Request = TypeVar("Request")
Response = TypeVar("Response", bound=_Answer)
Method = Callable[[Member], UnaryUnaryMultiCallable[Request, Response]]


class Connection:
    def __init__(self, config: EtcdConfig, clock: Clock, chance: random.Random) -> None:
        if not config.endpoints:
            raise Unusable("etcd.endpoints is empty; name at least one host:port")
        self._config = config
        self._clock = clock
        self._chance = chance
        servers = list(config.endpoints)
        chance.shuffle(servers)
        self._members = members(config, servers)
        self._index = 0
        self._reached: Member | None = None
        self.term = 0
        self._lost = False
        self._token = ""
        self._login: asyncio.Future[None] | None = None
        # Made once: grpc.aio would make one of a tuple at every call.
        self._metadata = Metadata(REQUIRE_LEADER)

    @property
    def timeout_s(self) -> float:
        return self._config.request_timeout_s

    @property
    def member(self) -> Member:
        """The endpoint in use."""
        return self._members[self._index]

    async def metadata(self) -> Metadata:
        """For a stream; logs in first when there is a user."""
        if self._config.username and not self._token:
            await self.log_in(stale="")
        return self._metadata

    async def call(
        self, method: Method[Request, Response], request: Request, *, repeatable: bool
    ) -> Response:
        """Within `request_timeout_s`. Raises from the tree of errors; see faults.py."""
        deadline_s = self._clock.monotonic_s() + self.timeout_s
        attempt = 0
        while True:
            try:
                return await self._once(method, request, deadline_s, repeatable=repeatable)
            except Retry as failure:
                attempt += 1
                if not (repeatable or isinstance(failure, Unsent | StaleToken)):
                    self._note_loss(failure)
                    raise
                await self._before_next(attempt, failure, deadline_s)

    async def _once(
        self,
        method: Method[Request, Response],
        request: Request,
        deadline_s: float,
        *,
        repeatable: bool,
    ) -> Response:
        metadata = await self.metadata() if self._config.username else self._metadata
        member = self._members[self._index]
        start_s = self._clock.monotonic_s()
        left_s = deadline_s - start_s
        if repeatable:
            # A silent endpoint must leave time to ask the others.
            left_s = min(left_s, self.timeout_s / len(self._members))
        COUNTS.calls += 1
        try:
            response = await method(member)(request, timeout=left_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            failure = translate(error, member.server)
            await self._after_failure(member, failure)
            raise failure from None
        if member is not self._reached:
            self.worked(member)
        self.told(response.header)
        if COUNTS.calls % TIMED_EVERY == 0:
            call_seconds.record(self._clock.monotonic_s() - start_s)
        return response

    def told(self, header: pb.ResponseHeader) -> None:
        """Of any answer. A member that lags behind may still name an older term."""
        if header.raft_term > self.term:
            self.term = header.raft_term

    def worked(self, member: Member) -> None:
        """`member` has answered."""
        if member is not self._reached or self._lost:
            log.info("store.reached", server=member.server)
        self._reached, self._lost = member, False

    def failed(self, member: Member) -> None:
        """Use another endpoint from now on, unless somebody has already moved away."""
        COUNTS.failures += 1
        if member is self.member and len(self._members) > 1:
            self._index = (self._index + 1) % len(self._members)
            COUNTS.moves += 1

    async def pause(self, attempt: int, failure: Retry) -> None:
        """Before a stream's next attempt, the first of which is number 1."""
        seconds = self._pause_s(attempt, failure)
        if seconds:
            await self._clock.sleep(seconds)

    async def after_stream(self, member: Member, error: Exception) -> TesseraError:
        """What one of STREAM_FAILURES means; moves to another endpoint or logs in anew."""
        match error:
            case grpc.aio.AioRpcError():
                failure = translate(error, member.server)
            case TesseraError():
                failure = error
            case TimeoutError():
                failure = Retry(f"etcd at {member.server} did not answer in time; is it stopped?")
            case _:
                failure = Retry(f"etcd at {member.server} broke off the stream")
        try:
            await self._after_failure(member, failure)
        except TesseraError as worse:
            return worse
        return failure

    async def log_in(self, stale: str) -> None:
        """Get a token other than `stale`; callers at the same time share one request."""
        while self._token == stale:
            if self._login is not None:
                await asyncio.shield(self._login)
                continue
            self._login = asyncio.get_running_loop().create_future()
            try:
                await self._authenticate()
            finally:
                self._login.set_result(None)
                self._login = None

    async def renew_login(self) -> bool:
        """False when there is no login to renew."""
        if not self._config.username:
            return False
        await self.log_in(stale=self._token)
        return True

    async def close(self) -> None:
        for member in self._members:
            await member.channel.close()

    async def _authenticate(self) -> None:
        member = self.member
        request = pb.AuthenticateRequest(name=self._config.username, password=self._config.password)
        try:
            answer = await member.auth.Authenticate(
                request,
                timeout=self.timeout_s / len(self._members),
                metadata=Metadata(REQUIRE_LEADER),
            )
        except grpc.aio.AioRpcError as error:
            self.failed(member)
            failure = translate(error, member.server)
            # Whatever became of the login, the request that needs it was not sent.
            raise Unsent(str(failure)) if isinstance(failure, Retry) else failure from None
        self._token = answer.token
        self._metadata = Metadata(REQUIRE_LEADER, ("token", answer.token))

    async def _after_failure(self, member: Member, failure: TesseraError) -> None:
        if isinstance(failure, StaleToken):
            if not await self.renew_login():
                raise Unusable(f"{failure}; set etcd.username and etcd.password")
        elif isinstance(failure, Retry):
            self.failed(member)

    async def _before_next(self, attempt: int, failure: Retry, deadline_s: float) -> None:
        """Raises `failure` when the deadline would pass, or a new login did not help."""
        pause_s = self._pause_s(attempt, failure)
        useless = isinstance(failure, StaleToken) and attempt > 1
        if useless or self._clock.monotonic_s() + pause_s >= deadline_s:
            self._note_loss(failure)
            raise self._of_all(failure)
        if pause_s:
            await self._clock.sleep(pause_s)

    def _of_all(self, failure: Retry) -> Retry:
        """`failure` is of the endpoint asked last; the others had their turn."""
        if len(self._members) == 1 or isinstance(failure, StaleToken):
            return failure
        servers = ", ".join(member.server for member in self._members)
        return Retry(f"no etcd of {servers} answers; the last said: {failure}")

    def _pause_s(self, attempt: int, failure: Retry) -> float:
        """None until every endpoint had its turn, then doubling, jittered downwards by a half."""
        rounds, rest = divmod(attempt, len(self._members))
        if rest or isinstance(failure, StaleToken):
            return 0.0
        self._note_loss(failure)
        longest_s = min(FIRST_PAUSE_S * 2.0 ** min(rounds - 1, 16), LONGEST_PAUSE_S)
        return longest_s * self._chance.uniform(0.5, 1.0)

    def _note_loss(self, failure: Retry) -> None:
        if not self._lost:
            log.warning("store.lost", servers=self._config.endpoints, error=str(failure))
        self._lost = True
