"""Endpoints whose labels make another identity now: moved in two steps, without a lost packet.

    due ──► ask for the number of every label set (takes the new references)
        ──► until every node allows the new number ──► its policy here ──► rows, announcement
        ──► give back the old number

Due when the label rules change, and when something was decided without identityd. The old number
stays allowed everywhere until the address was announced under the new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tessera_wire.policy.v1 import policy_pb2

from datapath.agent.endpoints import announced
from datapath.agent.record import EndpointRecord, State
from datapath.agent.session import Announced, Granted
from identity.numbers import NumericIdentity
from services.runtime.clock import Clock
from services.runtime.errors import Retry, TesseraError
from services.runtime.log import logger
from services.wire.client import call

if TYPE_CHECKING:
    from tessera_wire.policy.v1.policy_pb2_grpc import PolicyAdminAsyncStub

log = logger(__name__)

PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
# One question to policyd; asked again until the answer is yes. Of several replicas each waits for
# nodes that are connected to the others, too, so they are asked briefly and in turn.
ASK_S = 4.0
ASK_EACH_S = 0.3
# A node that is not connected maps addresses to what it last heard, and learns both numbers in one
# snapshot when it returns; so it is not waited for longer than this.
AWAY_S = 20.0

Sets = Mapping[tuple[str, ...], NumericIdentity]


class Endpoints(Protocol):
    @property
    def records(self) -> tuple[EndpointRecord, ...]: ...
    async def at_rest(self, record: EndpointRecord) -> None: ...
    async def move(self, record: EndpointRecord, identity: NumericIdentity) -> bool: ...
    async def let_go(self, identity: NumericIdentity) -> None: ...


class Identities(Protocol):
    async def live(self) -> None: ...
    async def refer(self, sets: Sets) -> Mapping[tuple[str, ...], Granted | TesseraError]: ...
    async def announce(self, items: list[Announced]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Move:
    record: EndpointRecord
    to: Granted


class Relabel:
    def __init__(
        self,
        endpoints: Endpoints,
        identities: Identities,
        everywhere: Callable[[int], Awaitable[None]],
        clock: Clock,
    ) -> None:
        """`everywhere` returns when every node allows what the store holds at a revision."""
        self._endpoints = endpoints
        self._identities = identities
        self._everywhere = everywhere
        self._clock = clock
        self._due = asyncio.Event()
        self._waiting: list[asyncio.Event] = []

    async def done(self) -> None:
        """Returns when all that is due now was moved, or cannot be."""
        over = asyncio.Event()
        self._waiting.append(over)
        self._due.set()
        await over.wait()

    def due(self) -> None:
        self._due.set()

    async def run(self) -> None:
        """Until cancelled."""
        pause_s = PAUSE_S
        while True:
            await self._due.wait()
            self._due.clear()
            waiting = tuple(self._waiting)
            try:
                await self.once()
                pause_s = PAUSE_S
                for over in waiting:
                    over.set()
                    self._waiting.remove(over)
            except TesseraError as error:
                log.warning("endpoints.relabel_waits", error=str(error), pause_s=pause_s)
                self._due.set()
                await self._clock.sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def once(self) -> None:
        """Raises `Retry` when identityd, or a node, cannot be asked; what was moved is moved."""
        await self._identities.live()
        for record in self._endpoints.records:
            # One that is being made may have asked under the old rules.
            await self._endpoints.at_rest(record)
        ready = [r for r in self._endpoints.records if r.state is State.READY and r.labels]
        answers = await self._identities.refer({r.labels: r.identity for r in ready})
        moves: list[_Move] = []
        for record in ready:
            answer = answers[record.labels]
            if isinstance(answer, TesseraError):
                log.warning("endpoint.keeps_identity", endpoint=record.ref, error=str(answer))
            elif answer.number != record.identity:
                moves.append(_Move(record, answer))
        if moves:
            await self._move(moves)

    async def _move(self, moves: list[_Move]) -> None:
        await self._everywhere(max(move.to.revision for move in moves))
        for move in moves:
            await self._endpoints.move(move.record, move.to.number)
        now = {record.key: record for record in self._endpoints.records}
        moved = [
            now[m.record.key]
            for m in moves
            if m.record.key in now and now[m.record.key].identity == m.to.number
        ]
        await self._identities.announce([one for record in moved for one in announced(record)])
        arrived = {record.identity for record in moved}
        unused = {move.to.number for move in moves} - arrived  # of endpoints that went away
        for number in sorted({move.record.identity for move in moves} | unused):
            await self._endpoints.let_go(number)
        log.info("endpoints.relabelled", count=len(moved))


class Everywhere:
    """Asks every replica of policyd whether its nodes have realised a revision; each replica knows
    the nodes that are connected to it."""

    def __init__(self, stubs: Sequence[PolicyAdminAsyncStub], clock: Clock) -> None:
        self._stubs = stubs
        self._clock = clock
        self._ask_s = ASK_S if len(stubs) == 1 else ASK_EACH_S

    async def __call__(self, revision: int) -> None:
        """Raises `Retry` naming the node that is behind, or when no replica answers."""
        began_s = self._clock.monotonic_s()
        while behind := await self._behind(revision):
            waited_s = self._clock.monotonic_s() - began_s
            if waited_s > AWAY_S and not any(node.connected for node in behind):
                return
            if waited_s > 2 * AWAY_S:
                first = behind[0]
                raise Retry(f"node {first.node} does not allow the new identities: {first.reason}")

    async def _behind(self, revision: int) -> list[policy_pb2.NodeState]:
        """Nodes of which no replica says that they have it; where one is connected speaks."""
        told: dict[str, policy_pb2.NodeState] = {}
        failure: Retry | None = None
        for stub in self._stubs:
            try:
                nodes = await self._ask(stub, revision)
            except Retry as error:
                failure = error
                continue
            for node in nodes:
                known = told.get(node.node)
                if known is None or not node.reason or (known.reason and node.connected):
                    told[node.node] = node
        if failure is not None and not told:
            raise failure
        return [node for node in told.values() if node.reason]

    async def _ask(
        self, stub: PolicyAdminAsyncStub, revision: int
    ) -> Sequence[policy_pb2.NodeState]:
        timeout_ms = int(self._ask_s * 1000)
        request = policy_pb2.WaitRealisedRequest(revision=revision, timeout_ms=timeout_ms)
        answer = await call(stub.WaitRealised, request, deadline_s=2 * ASK_S)
        return answer.nodes
