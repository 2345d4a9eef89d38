"""How far each node is: who is connected here, what each has acknowledged, and who is waited for.

Registered nodes come from the store, connected ones from the streams; a node may be either alone.
Acknowledgements are kept in memory: each replica knows those of the agents connected to it.
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
    """`failures`: identities whose policy of `realised` is not in force, and why."""

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
        self._progress: dict[str, Progress] = {}

    @property
    def connected(self) -> frozenset[str]:
        return frozenset(self._streams)

    def opened(self, subscription: Subscription) -> None:
        """The newest stream of a node speaks for it; one that is still open is ended."""
        old = self._streams.get(subscription.node)
        if old is not None:
            old.end(Retry(f"node {subscription.node} opened another stream; this one ends"))
        self._streams[subscription.node] = subscription
        self._pulse.beat()

    def closed(self, subscription: Subscription) -> None:
        if self._streams.get(subscription.node) is subscription:
            del self._streams[subscription.node]
            self._pulse.beat()

    def acknowledged(
        self, subscription: Subscription, revision: int, failures: Mapping[NumericIdentity, str]
    ) -> None:
        """A revision that was not sent yet cannot be realised; it counts as what was sent."""
        if self._streams.get(subscription.node) is subscription:
            realised = min(revision, subscription.revision)
            self._progress[subscription.node] = Progress(realised, dict(failures))
            self._pulse.beat()

    def forget_all_but(self, registered: Iterable[str]) -> None:
        """Drops what disconnected, unregistered nodes once acknowledged."""
        keep = self.connected | frozenset(registered)
        for node in self._progress.keys() - keep:
            del self._progress[node]

    def state(self, node: str, revision: int) -> NodeState:
        progress = self._progress.get(node, _NOTHING)
        connected = node in self._streams
        return NodeState(node, connected, progress.realised, _reason(progress, connected, revision))

    def states(self, registered: Iterable[str], revision: int) -> list[NodeState]:
        """Of every node, by name. `reason` says what keeps it from `revision`."""
        return [self.state(node, revision) for node in sorted(self.connected | set(registered))]


def _reason(progress: Progress, connected: bool, revision: int) -> str:  # noqa: FBT001
    if progress.realised < revision:
        if connected:
            return f"behind, at revision {progress.realised}"
        seen = f"; it was at revision {progress.realised}" if progress.realised else ""
        return f"not connected{seen}"
    if progress.failures:
        identity, reason = min(progress.failures.items())
        more = len(progress.failures) - 1
        return f"identity {identity}: {reason}" + (f" (and {more} more)" if more else "")
    return ""
