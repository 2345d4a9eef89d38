"""Node sessions: one lease per node, on which everything hangs that the node publishes.

The node's own key carries the lease too; that is how a returning node proves that the lease it
remembers is its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import msgspec

from identity import keys
from services.identityd.announce import canonical
from services.identityd.published import NodeAddress, NodeValue
from services.identityd.stats import Counts
from services.runtime.errors import Invalid, NotFound
from services.runtime.log import logger
from services.store.model import NO_LEASE, KeyValue, LeaseId, Store

log = logger(__name__)

# Shorter ones do not survive a restart of the store; the longest is a day.
MIN_TTL_S: Final = 5
MAX_TTL_S: Final = 86_400

_NODE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Session:
    lease: LeaseId
    ttl_s: int
    resumed: bool


class Sessions:
    def __init__(
        self, store: Store, counts: Counts, *, cluster: str, cluster_id: int, ttl_s: int
    ) -> None:
        self._store = store
        self._counts = counts
        self._cluster = cluster
        self._cluster_id = cluster_id
        self._ttl_s = ttl_s

    async def open(self, node: str, previous: LeaseId, ttl_s: int, *internal_ips: str) -> Session:
        """`previous`, if alive and this node's, is kept: references and announcements stay."""
        check_node(node)
        value = self._node_value(node, internal_ips)
        ttl_s = self._checked(ttl_s)
        registered = await self._store.get(keys.node_key(self._cluster, node))
        session = await self._resume(registered, previous)
        if session is None:
            session = Session(await self._store.grant(ttl_s), ttl_s, resumed=False)
        if not session.resumed or registered is None or registered.value != value:
            await self._store.put(keys.node_key(self._cluster, node), value, session.lease)
        self._counts.sessions += 1
        state = "resumed" if session.resumed else "new"
        log.info("session.opened", node=node, lease=session.lease, state=state)
        return session

    async def _resume(self, registered: KeyValue | None, previous: LeaseId) -> Session | None:
        if previous == NO_LEASE or registered is None or registered.lease != previous:
            return None
        left_s = await self._store.keep_alive(previous)
        return Session(previous, left_s, resumed=True) if left_s > 0 else None

    async def extend(self, node: str, ttl_s: int) -> tuple[LeaseId, int]:
        """Another lease for what the node publishes, and its life in seconds."""
        check_node(node)
        ttl_s = self._checked(ttl_s)
        return await self._store.grant(ttl_s), ttl_s

    async def keep_alive(self, leases: Iterable[LeaseId]) -> int:
        """Seconds left of the first to end; 0 when one is gone."""
        wanted = tuple(leases)
        for lease in wanted:
            check_lease(lease)
        # One after the other: each waits for one answer on a stream that all share.
        return min([await self._store.keep_alive(lease) for lease in wanted])

    def _checked(self, ttl_s: int) -> int:
        ttl_s = ttl_s or self._ttl_s
        if not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
            raise Invalid(f"session ttl_s {ttl_s} is not within {MIN_TTL_S}..{MAX_TTL_S}")
        return ttl_s

    async def close(self, node: str, lease: LeaseId) -> None:
        """Everything that hangs on the lease disappears with it. Idempotent."""
        check_node(node)
        check_lease(lease)
        try:
            await self._store.revoke(lease)
        except NotFound:
            return
        log.info("session.closed", node=node, lease=lease)

    def _node_value(self, node: str, internal_ips: Iterable[str]) -> bytes:
        addresses = tuple(
            NodeAddress("InternalIP", canonical(ip, "internal_ip")) for ip in internal_ips if ip
        )
        value = NodeValue(node, self._cluster, addresses, cluster_id=self._cluster_id)
        return msgspec.json.encode(value)


def check_node(node: str) -> None:
    if not _NODE_NAME.fullmatch(node):
        raise Invalid(
            f"node name {node!r} is not 1 to 253 letters, digits, '.', '_', '-' with a letter or"
            " digit at both ends; set agent.node_name"
        )


def check_lease(lease: LeaseId) -> None:
    if lease <= NO_LEASE:
        raise Invalid(f"lease {lease} is none; open a session first and pass its lease")
