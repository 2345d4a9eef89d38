"""Change-sets to many subscriptions: a shared, bounded log and what is encoded along it.

    View --publish--> Log (keys per change-set) --span(position)--> Subscription.take --> stream
                        |                              |
                        +--> Payloads (newest values) -+

A subscriber that keeps up takes each change-set alone; one that does not takes the run it missed,
merged once for all who missed the same. Work per change-set and subscriber that nothing concerns:
one wake-up and one write of shared bytes. In a storm the wake-ups are paced, so that the writes do
not take all of the loop; the first after a quiet time goes out at once. Addresses come and go with
every endpoint of the cluster and concern every node: they are paced longest.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Final

from identity.numbers import NumericIdentity
from services.policyd.change import ChangeSet, Gathering
from services.policyd.payload import MESSAGE_BYTES, Payloads, Span
from services.policyd.state import State
from services.policyd.subscriber import Counts, Subscription
from services.runtime.clock import Clock
from services.wire.held import NOTHING, Held

# Past this many keys a snapshot says less than the log would.
LOG_KEYS: Final = 200_000
# One write to one stream takes some 50 us of the loop (grpc.aio); twice that for each subscriber
# between two rounds leaves half of the loop to everything else.
_PAUSE_PER_SUBSCRIBER_S: Final = 100e-6
# What changes a verdict waits no longer than this.
_STORM_S: Final = 0.05
# Where an address is found may wait: until it is told, it counts as the world.
_ADDRESSES_S: Final = 0.5


class Distributor:
    def __init__(
        self, state: State, *, log_keys: int = LOG_KEYS, message_bytes: int = MESSAGE_BYTES
    ) -> None:
        self.state = state
        self.payloads = Payloads(state, message_bytes)
        self.counts = Counts()
        self._log: deque[ChangeSet] = deque()
        self._log_keys = log_keys
        self._weight = 0
        # The revision that the oldest change-set of the log leads on from.
        self._floor = state.revision
        self.instance = ""
        self._end = 0
        self._spans: dict[int, Span] = {}
        self.subscriptions: set[Subscription] = set()
        self._round = asyncio.Event()
        self._pausing = False
        self._missed = False
        self._urgent = False

    @property
    def end(self) -> int:
        return self._end

    def publish(self, change: ChangeSet) -> None:
        """The state is already what `change` made it."""
        self.payloads.advance(change)
        self._log.append(change)
        self._end += 1
        self._weight += change.weight
        while self._weight > self._log_keys and len(self._log) > 1:
            self._drop_oldest()
        self._spans.clear()
        if self._pausing:
            self._missed = True
            self._urgent |= not change.addresses_alone
        else:
            self._wake()

    def listed(self, instance: str) -> None:
        """The state is complete. What was published until now is a listing, which does not tell
        what was removed before it, so nobody goes on from within it."""
        self.instance = instance
        while self._log:
            self._drop_oldest()
        self._floor = self.state.revision

    def _drop_oldest(self) -> None:
        oldest = self._log.popleft()
        self._weight -= oldest.weight
        self._floor = oldest.revision

    async def pace(self, clock: Clock) -> None:
        """A pause after every round of wake-ups, and a round for what came during it; until
        cancelled. Addresses alone wait for the long pause, everything else for the short one."""
        while True:
            await self._round.wait()
            self._round.clear()
            long_s = min(len(self.subscriptions) * _PAUSE_PER_SUBSCRIBER_S, _ADDRESSES_S)
            short_s = min(long_s, _STORM_S)
            await clock.sleep(short_s)
            paused_s = short_s
            while not self._urgent and paused_s < long_s:
                await clock.sleep(short_s)
                paused_s += short_s
            self._pausing = False
            if self._missed:
                self._wake()

    def _wake(self) -> None:
        self._pausing, self._missed, self._urgent = True, False, False
        self._round.set()
        for subscription in self.subscriptions:
            subscription.wake()

    def span(self, position: int) -> Span | None:
        missed = self._end - position
        if missed > len(self._log):
            return None
        span = self._spans.get(position)
        if span is None:
            after = self._log[-missed - 1].revision if missed < len(self._log) else self._floor
            span = self._spans[position] = Span(self._merge(missed), after, self.payloads)
        return span

    def position_of(self, instance: str, revision: int) -> int | None:
        """From where the log leads on from `revision`; None: it does not reach back, or it is
        another store's. Change-sets of other replicas end elsewhere: one may be told again."""
        if instance != self.instance or not self._floor <= revision <= self.state.revision:
            return None
        newer = 0
        for change in reversed(self._log):
            if change.revision <= revision:
                break
            newer += 1
        return self._end - newer

    @contextmanager
    def subscribed(
        self, node: str, identities: Iterable[NumericIdentity], held: Held = NOTHING
    ) -> Iterator[Subscription]:
        subscription = Subscription(self, node, identities, held)
        self.subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self.subscriptions.discard(subscription)

    def _merge(self, count: int) -> ChangeSet:
        if count == 1:
            return self._log[-1]
        gathering = Gathering(self.state.revision)
        for change in islice(self._log, len(self._log) - count, None):
            gathering.add(change)
        return gathering.close()
