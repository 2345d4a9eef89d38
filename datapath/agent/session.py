"""The node's session with identityd: the lease that identities and announcements hang on.

    open(previous lease) ─ resumed ──────────────────► keep alive every third of its time
          ▲                └ new ──► publish again ──┘            │ the lease is gone
          └───────────────────────────────────────────────────────┘

While identityd is away nothing is undone: what the node enforces does not depend on the lease.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tessera_wire.identity.v1 import identity_pb2 as pb

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
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 15.0

_PROBLEMS: dict[str, type[TesseraError]] = {
    "retry": Retry,
    "conflict": Conflict,
    "invalid": Invalid,
    "exhausted": Exhausted,
}


@dataclass(frozen=True, slots=True)
class Announced:
    ip: str
    identity: NumericIdentity
    namespace: str
    name: str


class Session:
    """`republish` runs whenever the lease is new; until it returned, the session is not open.
    `on_lease` then, to note the lease."""

    def __init__(
        self,
        stub: IdentityServiceAsyncStub,
        *,
        node: str,
        node_ip: str,
        previous_lease: int,
        republish: Callable[[], Awaitable[None]],
        on_lease: Callable[[], Awaitable[None]],
        clock: Clock,
        jitter: random.Random,
    ) -> None:
        self._stub = stub
        self._node = node
        self._node_ip = node_ip
        self._republish = republish
        self._on_lease = on_lease
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
            node=self._node, previous_lease=self.lease, internal_ip=self._node_ip
        )
        session = await call(self._stub.OpenSession, request, deadline_s=RPC_DEADLINE_S)
        self.lease = session.lease
        if not session.resumed:
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
            request = pb.KeepAliveRequest(lease=self.lease)
            kept = await call(self._stub.KeepAlive, request, deadline_s=RPC_DEADLINE_S)
            ttl_s = kept.ttl_s
        self._opened.clear()
        self.connected, self.error = False, "the session's lease was lost"
        log.warning("session.lost", lease=self.lease)

    async def _live(self) -> int:
        try:
            async with asyncio.timeout(OPEN_DEADLINE_S):
                await self._opened.wait()
        except TimeoutError:
            raise Retry(f"no session with identityd: {self.error}") from None
        return self.lease

    # -------------------------------------------------------------- calls under the lease

    async def allocate(
        self, labels: tuple[str, ...], previous: NumericIdentity = NO_IDENTITY
    ) -> NumericIdentity:
        """Idempotent; takes this node's reference."""
        return await self._allocate(labels, previous, await self._live())

    async def reallocate(
        self, labels: tuple[str, ...], previous: NumericIdentity
    ) -> NumericIdentity:
        """For `republish`, which runs before the session counts as open."""
        return await self._allocate(labels, previous, self.lease)

    async def _allocate(
        self, labels: tuple[str, ...], previous: NumericIdentity, lease: int
    ) -> NumericIdentity:
        item = pb.AllocateItem(labels=pb.LabelSet(labels=labels), previous=previous)
        request = pb.AllocateRequest(node=self._node, lease=lease, items=[item])
        response = await call(self._stub.Allocate, request, deadline_s=RPC_DEADLINE_S)
        result = response.results[0]
        if result.HasField("problem"):
            raise _PROBLEMS.get(result.problem.kind, Retry)(result.problem.message)
        return NumericIdentity(result.identity)

    async def release(self, identities: Sequence[NumericIdentity]) -> None:
        request = pb.ReleaseRequest(node=self._node, identities=identities)
        await call(self._stub.Release, request, deadline_s=RPC_DEADLINE_S)

    async def announce(self, items: Sequence[Announced]) -> None:
        request = pb.AnnounceRequest(
            node=self._node,
            lease=self.lease,
            items=[
                pb.Announcement(
                    ip=item.ip,
                    identity=item.identity,
                    host_ip=self._node_ip,
                    namespace=item.namespace,
                    name=item.name,
                )
                for item in items
            ],
        )
        await call(self._stub.Announce, request, deadline_s=RPC_DEADLINE_S)

    async def withdraw(self, ips: Sequence[str]) -> None:
        request = pb.WithdrawRequest(node=self._node, host_ip=self._node_ip, ips=ips)
        await call(self._stub.Withdraw, request, deadline_s=RPC_DEADLINE_S)


def _how(*, resumed: bool) -> str:
    return "resumed" if resumed else "new"
