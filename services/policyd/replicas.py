"""What the replicas of policyd tell each other of their nodes, so that each can answer for all.

    Nodes.report ──► tessera/policyd/replica/<id>   leased, JSON   ──watch──► Nodes.elsewhere

One key per replica, however many nodes: the revision that most of its nodes have realised, and the
nodes that have another. It is written when something moved, at once after a quiet time and then no
faster than BYTES_PER_S, so that the store bears the same whether ten or ten thousand nodes
acknowledge. A replica that dies is forgotten with its lease; its nodes are elsewhere by then, on a
newer stream.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import msgspec

from identity.numbers import NumericIdentity
from services.policyd.nodes import Nodes, Progress
from services.runtime.clock import Clock
from services.runtime.errors import Exhausted, NotFound, Retry
from services.runtime.log import logger
from services.store.model import NO_LEASE, Changed, Removed, Store

log = logger(__name__)

REPLICA_PREFIX: Final = "tessera/policyd/replica/"
LEASE_TTL_S: Final = 10
PAUSE_S: Final = 0.1
BYTES_PER_S: Final = 200_000
# A value of etcd holds 1.5 MB; what fails on more nodes than this fails for one reason.
_FAILURES_TOLD: Final = 500
_FAILURE_CHARS: Final = 300
_MANY: Final[dict[int, str]] = {
    0: "its newest policy is not in force; see `tessera status` on the node"
}


class _At(msgspec.Struct, frozen=True, array_like=True):
    sent: int
    realised: int


class Report(msgspec.Struct, frozen=True):
    """`nodes`: their streams. `others`: of the nodes that are not at `sent` and `realised`."""

    sent: int
    realised: int
    nodes: dict[str, int]
    others: dict[str, _At] = {}
    failures: dict[str, dict[int, str]] = {}


def encode(progress: Mapping[str, Progress]) -> bytes:
    counted = Counter((one.sent, one.realised) for one in progress.values())
    (sent, realised), _ = counted.most_common(1)[0] if counted else ((0, 0), 0)
    failing = [node for node, one in progress.items() if one.failures]
    report = Report(
        sent,
        realised,
        {node: one.stream for node, one in progress.items()},
        {
            node: _At(one.sent, one.realised)
            for node, one in progress.items()
            if (one.sent, one.realised) != (sent, realised)
        },
        {
            node: _told(progress[node].failures) if at < _FAILURES_TOLD else _MANY
            for at, node in enumerate(failing)
        },
    )
    return msgspec.json.encode(report)


def decode(value: bytes) -> dict[str, Progress]:
    """Raises `msgspec.DecodeError`."""
    report = msgspec.json.decode(value, type=Report)
    most = _At(report.sent, report.realised)
    found = {}
    for node, stream in report.nodes.items():
        at = report.others.get(node, most)
        failures = {NumericIdentity(i): r for i, r in report.failures.get(node, {}).items()}
        found[node] = Progress(stream, at.sent, at.realised, failures)
    return found


def _told(failures: Mapping[NumericIdentity, str]) -> dict[int, str]:
    first = sorted(failures.items())[:4]
    return {int(identity): reason[:_FAILURE_CHARS] for identity, reason in first}


class Replicas:
    def __init__(self, store: Store, nodes: Nodes, clock: Clock) -> None:
        self._store = store
        self._nodes = nodes
        self._clock = clock
        self._key = REPLICA_PREFIX + secrets.token_hex(8)
        self._lease = NO_LEASE
        self._written = b""

    async def follow(self) -> None:
        """Until cancelled."""
        async for events in self._store.watch(REPLICA_PREFIX):
            for event in events:
                match event:
                    case Changed(kv=kv) if kv.key != self._key:
                        try:
                            self._nodes.elsewhere(kv.key, decode(kv.value))
                        except msgspec.DecodeError as error:
                            log.warning("store.value_broken", name=kv.key, reason=str(error))
                    case Removed(key=key):
                        self._nodes.elsewhere(key, {})
                    case _:
                        pass

    async def tell(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._tell_what_moves()
            except NotFound:
                self._lease = NO_LEASE
            except (Retry, Exhausted) as error:
                log.warning("replica.untold", error=str(error))
                await self._clock.sleep(LEASE_TTL_S / 10)

    async def _tell_what_moves(self) -> None:
        """Raises `NotFound` when the lease is gone."""
        if self._lease == NO_LEASE:
            self._lease, self._written = await self._store.grant(LEASE_TTL_S), b""
        kept_s = self._clock.monotonic_s()
        while True:
            if self._clock.monotonic_s() - kept_s > LEASE_TTL_S / 3:
                kept_s = self._clock.monotonic_s()
                if await self._store.keep_alive(self._lease) == 0:
                    raise NotFound("the lease of this replica is gone")
            value = encode(self._nodes.report())
            if value != self._written:
                await self._store.put(self._key, value, self._lease)
                self._written = value
                await self._clock.sleep(max(PAUSE_S, len(value) / BYTES_PER_S))
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(LEASE_TTL_S / 3):
                    await self._nodes.moved.wait()
