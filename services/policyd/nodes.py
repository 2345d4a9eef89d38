"""How far each node is: who is connected, what each was sent, and what it has acknowledged.

    streams here --opened, acknowledged--> Nodes <--elsewhere-- what the other replicas report
                                             |
                             report() -------+------> state(node): the newest stream speaks

Registered nodes come from the store, connected ones from the streams of all replicas; a node may be
either alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from identity.numbers import NumericIdentity
from services.policyd.subscriber import Subscription
from services.runtime.errors import Retry


class Pulse:
    """Wakes everyone who waits; whoever waits looks for himself what is new."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def beat(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()


@dataclass(frozen=True, slots=True)
class Progress:
    """`stream`: greater for a later stream of the node. `failures`: identities whose policy of
    `realised` is not in force, and why."""

    stream: int = 0
    sent: int = 0
    realised: int = 0
    failures: Mapping[NumericIdentity, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NodeState:
    node: str
    connected: bool
    realised: int
    reason: str


_NOTHING = Progress()


class Nodes:
    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._streams: dict[str, Subscription] = {}
        self._numbers: dict[str, int] = {}
        self._progress: dict[str, Progress] = {}
        self._elsewhere: dict[str, Mapping[str, Progress]] = {}
        self._best: dict[str, Progress] = {}
        # Beats when what `report` says may have changed.
        self.moved = Pulse()

    @property
    def connected(self) -> frozenset[str]:
        """To any replica."""
        return frozenset(self._streams) | self._best.keys()

    def is_connected(self, node: str) -> bool:
        return node in self._streams or node in self._best

    def opened(self, subscription: Subscription, stream: int = 0) -> None:
        """The newest stream of a node speaks for it; one that is still open is ended."""
        old = self._streams.get(subscription.node)
        if old is not None:
            old.end(Retry(f"node {subscription.node} opened another stream; this one ends"))
        self._streams[subscription.node] = subscription
        self._numbers[subscription.node] = stream
        self._beat()

    def closed(self, subscription: Subscription) -> None:
        if self._streams.get(subscription.node) is subscription:
            del self._streams[subscription.node]
            self._beat()

    def acknowledged(
        self, subscription: Subscription, revision: int, failures: Mapping[NumericIdentity, str]
    ) -> None:
        """A revision that was not sent yet cannot be realised; it counts as what was sent."""
        node = subscription.node
        if self._streams.get(node) is subscription:
            sent = subscription.revision
            realised = min(revision, sent)
            self._progress[node] = Progress(self._numbers[node], sent, realised, dict(failures))
            self._beat()

    def elsewhere(self, replica: str, progress: Mapping[str, Progress]) -> None:
        """All that another replica says of the nodes connected to it."""
        if progress:
            self._elsewhere[replica] = progress
        else:
            self._elsewhere.pop(replica, None)
        best: dict[str, Progress] = {}
        for reported in self._elsewhere.values():
            for node, one in reported.items():
                if node not in best or best[node].stream < one.stream:
                    best[node] = one
        self._best = best
        for node, one in best.items():
            own = self._streams.get(node)
            if own is not None and self._numbers[node] < one.stream:
                own.end(Retry(f"node {node} is connected to another replica; this stream ends"))
        self._pulse.beat()

    def report(self) -> dict[str, Progress]:
        """Of the nodes connected here, for the other replicas."""
        return {node: self._here(node) for node in self._streams}

    def forget_all_but(self, registered: Iterable[str]) -> None:
        """Drops what disconnected, unregistered nodes once acknowledged."""
        keep = self._streams.keys() | frozenset(registered)
        for node in self._progress.keys() - keep:
            del self._progress[node]
        for node in self._numbers.keys() - keep:
            del self._numbers[node]

    def progress(self, node: str) -> tuple[Progress, bool]:
        """The newest there is, and whether the node is connected."""
        there = self._best.get(node)
        if node not in self._streams:
            return (self._progress.get(node, _NOTHING), False) if there is None else (there, True)
        here = self._here(node)
        return (here if there is None or here.stream >= there.stream else there), True

    def state(self, node: str, revision: int) -> NodeState:
        progress, connected = self.progress(node)
        return NodeState(node, connected, progress.realised, _reason(progress, connected, revision))

    def states(self, registered: Iterable[str], revision: int) -> list[NodeState]:
        """Of every node, by name. `reason` says what keeps it from `revision`."""
        return [self.state(node, revision) for node in sorted(self.connected | set(registered))]

    def _here(self, node: str) -> Progress:
        """What the last ack said, whichever stream it came by."""
        known = self._progress.get(node, _NOTHING)
        sent = self._streams[node].revision
        return Progress(self._numbers[node], sent, known.realised, known.failures)

    def _beat(self) -> None:
        self._pulse.beat()
        self.moved.beat()


def _reason(progress: Progress, connected: bool, revision: int) -> str:  # noqa: FBT001
    if progress.realised < revision:
        if connected:
            return f"behind, at revision {progress.realised}"
        seen = f"; it was at revision {progress.realised}" if progress.realised else ""
        return f"not connected{seen}"
    return failures_in_words(progress.failures)


def failures_in_words(failures: Mapping[NumericIdentity, str]) -> str:
    if not failures:
        return ""
    identity, reason = min(failures.items())
    more = len(failures) - 1
    return f"identity {identity}: {reason}" + (f" (and {more} more)" if more else "")
