"""Identities as endpoints ask for them: from identityd, or from memory while that is away.

What was decided without identityd is owed to it: references and announcements follow when it
answers again (relabel.py), and a number that turned out to be another one is exchanged then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from datapath.agent.known import Known
from datapath.agent.session import Announced, Granted, Session, Sets
from identity.numbers import INIT, NumericIdentity
from services.runtime.clock import Clock
from services.runtime.errors import Retry, TesseraError
from services.runtime.log import logger

log = logger(__name__)


class Identities:
    """`in_use`: numbers of this node's endpoints. `owing` runs whenever something is owed.
    `unknown_as_init`: label sets not known here are `init` until identityd answers; else the
    endpoint is refused and its creator tries again."""

    def __init__(
        self,
        session: Session,
        known: Known,
        *,
        in_use: Callable[[], frozenset[NumericIdentity]],
        owing: Callable[[], None],
        unknown_as_init: bool,
        clock: Clock,
    ) -> None:
        self._session = session
        self._known = known
        self._in_use = in_use
        self._owing = owing
        self._unknown_as_init = unknown_as_init
        self._clock = clock
        self._owed = False

    async def allocate(self, labels: tuple[str, ...]) -> NumericIdentity:
        """Raises `Retry` when identityd is away and nothing is known, or what identityd says."""
        if not self._session.connected and (number := self._recall(labels)) is not None:
            return self._without_asking(labels, number, self._session.error)
        try:
            number = await self._session.allocate(labels)
        except Retry as error:
            recalled = self._recall(labels)
            if recalled is None and not self._unknown_as_init:
                raise
            return self._without_asking(labels, recalled or INIT, str(error))
        self._known.learn(labels, number, self._clock.now_s())
        return number

    async def live(self) -> None:
        """Raises `Retry` while identityd is away."""
        await self._session.live()

    async def refer(self, sets: Sets) -> Mapping[tuple[str, ...], Granted | TesseraError]:
        answers = await self._session.refer(sets)
        for labels, answer in answers.items():
            if isinstance(answer, Granted):
                self._known.learn(labels, answer.number, self._clock.now_s())
        self._owed = False
        return answers

    async def release(self, identities: Sequence[NumericIdentity]) -> None:
        await self._session.release(identities)

    async def announce(self, items: Sequence[Announced]) -> None:
        try:
            await self._session.announce(items)
        except Retry:
            # Peers will hear together with the reference; this node knows its own endpoint.
            if not self._owed:
                raise

    async def withdraw(self, ips: Sequence[str]) -> None:
        await self._session.withdraw(ips)

    def _recall(self, labels: tuple[str, ...]) -> NumericIdentity | None:
        return self._known.recall(labels, self._in_use(), self._clock.now_s())

    def _without_asking(
        self, labels: tuple[str, ...], number: NumericIdentity, reason: str
    ) -> NumericIdentity:
        log.warning("identity.from_memory", identity=number, labels=labels, reason=reason)
        self._owed = True
        self._owing()
        return number
