"""The node's session with identityd: the lease that identities and announcements hang on.

    open(previous lease) ─ resumed ──────────────────► keep alive every third of its time
          ▲                └ new ──► publish again ──┘            │ the lease is gone
          └───────────────────────────────────────────────────────┘

While identityd is away nothing is undone: what the node enforces does not depend on the lease.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc.aio
from tessera_wire.identity.v1 import identity_pb2 as pb

from datapath.agent.leases import KEYS_PER_LEASE, Leases
from datapath.agent.record import NO_IDENTITY
from identity.numbers import NumericIdentity
from services.runtime.clock import Clock
from services.runtime.errors import Conflict, Exhausted, Invalid, Retry, TesseraError
from services.runtime.log import logger
from services.wire.client import call

if TYPE_CHECKING:
    from tessera_wire.identity.v1.identity_pb2_grpc import IdentityServiceAsyncStub

log = logger(__name__)

# A third of the lease's life at the least asked for; slower answers are failures.
RPC_DEADLINE_S = 5.0
# For an agent, or a control plane, that is just starting.
OPEN_DEADLINE_S = 5.0
# Sets, or addresses, of one request.
BATCH = 1000
RULES_PAUSE_S = 5.0
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 15.0

_PROBLEMS: dict[str, type[TesseraError]] = {
    "retry": Retry,
    "conflict": Conflict,
    "invalid": Invalid,
    "exhausted": Exhausted,
}


Sets = Mapping[tuple[str, ...], NumericIdentity]
"""Label sets, each with the number it had; 0 for none."""


@dataclass(frozen=True, slots=True)
class Granted:
    """`revision` of the store since when the set has the number."""

    number: NumericIdentity
    revision: int


@dataclass(frozen=True, slots=True)
class Announced:
    ip: str
    identity: NumericIdentity
    namespace: str
    name: str


class Session:
    """`republish` runs whenever the lease is new; until it returned, the session is not open.
    `on_lease` then, to note the lease. `held`: how many endpoints publish under it."""

    def __init__(
        self,
        stub: IdentityServiceAsyncStub,
        *,
        node: str,
        node_ip: str,
        node_ip6: str = "",
        previous_lease: int,
        republish: Callable[[], Awaitable[None]],
        on_lease: Callable[[], Awaitable[None]],
        held: Callable[[], int],
        clock: Clock,
        jitter: random.Random,
    ) -> None:
        self._stub = stub
        self._node = node
        self._node_ip = node_ip
        self._node_ip6 = node_ip6
        self._republish = republish
        self._on_lease = on_lease
        self._held = held
        self._leases = Leases()
        # The keys under which `_leases` knows the references.
        self._sets_of: defaultdict[NumericIdentity, set[str]] = defaultdict(set)
        self._clock = clock
        self._jitter = jitter
        self.lease = previous_lease
        self.connected = False
        self.error = "not connected yet"
        self._opened = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                ttl_s = await self._open()
                pause_s = FIRST_PAUSE_S
                await self._keep(ttl_s)
            except TesseraError as error:
                if self.error != str(error):
                    log.warning("session.away", error=str(error), pause_s=round(pause_s, 1))
                self.connected, self.error = False, str(error)
                await self._clock.sleep(pause_s * self._jitter.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _open(self) -> int:
        request = pb.OpenSessionRequest(
            node=self._node,
            previous_lease=self.lease,
            internal_ip=self._node_ip,
            internal_ip6=self._node_ip6,
        )
        session = await call(self._stub.OpenSession, request, deadline_s=RPC_DEADLINE_S)
        self.lease = session.lease
        self._leases.begin(session.lease)
        # Of many endpoints some hang on leases that an earlier run has taken with it.
        if not session.resumed or 2 * self._held() > KEYS_PER_LEASE:
            await self._republish()
            await self._on_lease()
        self.connected, self.error = True, ""
        self._opened.set()
        log.info("session.opened", lease=session.lease, state=_how(resumed=session.resumed))
        return session.ttl_s

    async def _keep(self, ttl_s: int) -> None:
        """Returns when the lease is gone."""
        while ttl_s > 0:
            await self._clock.sleep(ttl_s / 3)
            first, *more = self._leases.ids
            request = pb.KeepAliveRequest(lease=first, more=more)
            kept = await call(self._stub.KeepAlive, request, deadline_s=RPC_DEADLINE_S)
            ttl_s = kept.ttl_s
        self._opened.clear()
        self.connected, self.error = False, "the session's lease was lost"
        log.warning("session.lost", lease=self.lease)

    async def live(self) -> None:
        """Raises `Retry` when no session is open within a few seconds."""
        try:
            async with asyncio.timeout(OPEN_DEADLINE_S):
                await self._opened.wait()
        except TimeoutError:
            raise Retry(f"no session with identityd: {self.error}") from None

    # -------------------------------------------------------------- calls under the lease

    async def allocate(
        self, labels: tuple[str, ...], previous: NumericIdentity = NO_IDENTITY
    ) -> NumericIdentity:
        """Idempotent; takes this node's reference."""
        await self.live()
        granted = (await self.refer({labels: previous}))[labels]
        if isinstance(granted, TesseraError):
            raise granted
        return granted.number

    async def refer(self, sets: Sets) -> dict[tuple[str, ...], Granted | TesseraError]:
        """A number and a reference for each set, in place of the one it had. Does not wait for the
        session: also for `republish`, which runs before that counts as open."""
        by_key = {_set_key(labels): labels for labels in sets}
        found: dict[tuple[str, ...], Granted | TesseraError] = {}
        for lease, keys in (await self._leases.spread(by_key, self._extend)).items():
            for some in _batches(keys):
                wanted = [by_key[key] for key in some]
                items = [
                    pb.AllocateItem(labels=pb.LabelSet(labels=labels), previous=sets[labels])
                    for labels in wanted
                ]
                request = pb.AllocateRequest(node=self._node, lease=lease, items=items)
                response = await call(self._stub.Allocate, request, deadline_s=RPC_DEADLINE_S)
                found |= zip(wanted, map(_granted, response.results), strict=True)
        for labels, answer in found.items():
            if isinstance(answer, Granted):
                self._sets_of[answer.number].add(_set_key(labels))
        return found

    async def release(self, identities: Sequence[NumericIdentity]) -> None:
        request = pb.ReleaseRequest(node=self._node, identities=identities)
        await call(self._stub.Release, request, deadline_s=RPC_DEADLINE_S)
        for identity in identities:
            self._leases.drop(self._sets_of.pop(identity, ()))

    async def announce(self, items: Sequence[Announced]) -> None:
        by_ip = {item.ip: item for item in items}
        for lease, ips in (await self._leases.spread(by_ip, self._extend)).items():
            for some in _batches(ips):
                request = pb.AnnounceRequest(
                    node=self._node,
                    lease=lease,
                    items=[self._announcement(by_ip[ip]) for ip in some],
                )
                await call(self._stub.Announce, request, deadline_s=RPC_DEADLINE_S)

    async def withdraw(self, ips: Sequence[str]) -> None:
        request = pb.WithdrawRequest(node=self._node, host_ip=self._node_ip, ips=ips)
        await call(self._stub.Withdraw, request, deadline_s=RPC_DEADLINE_S)
        self._leases.drop(ips)

    async def _extend(self) -> int:
        request = pb.ExtendSessionRequest(node=self._node)
        extended = await call(self._stub.ExtendSession, request, deadline_s=RPC_DEADLINE_S)
        return extended.lease

    def _announcement(self, item: Announced) -> pb.Announcement:
        return pb.Announcement(
            ip=item.ip,
            identity=item.identity,
            host_ip=self._node_ip,
            namespace=item.namespace,
            name=item.name,
        )

    # -------------------------------------------------------------- label rules

    async def follow_rules(self, changed: Callable[[], None]) -> None:
        """Until cancelled: `changed` runs for each version of the label rules, the first included,
        since they may have changed while this agent was not running."""
        version = ""
        while True:
            stream = self._stub.FollowLabelRules(pb.FollowLabelRulesRequest(node=self._node))
            try:
                async for news in stream:
                    if news.version != version:
                        version = news.version
                        changed()
            except grpc.aio.AioRpcError as error:
                log.debug("rules.away", error=error.details())
            finally:
                stream.cancel()
            await self._clock.sleep(RULES_PAUSE_S * self._jitter.uniform(0.5, 1.0))


def _granted(result: pb.AllocateResult) -> Granted | TesseraError:
    if result.HasField("problem"):
        return _PROBLEMS.get(result.problem.kind, Retry)(result.problem.message)
    return Granted(NumericIdentity(result.identity), result.revision)


def _set_key(labels: tuple[str, ...]) -> str:
    return ";".join(labels)


def _batches(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    return (keys[start : start + BATCH] for start in range(0, len(keys), BATCH))


def _how(*, resumed: bool) -> str:
    return "resumed" if resumed else "new"
