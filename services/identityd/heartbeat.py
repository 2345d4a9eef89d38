"""The sign of life in the store: to other clusters, and from the store through the watch.

Every replica writes both keys; one more writer does no harm, and none is missed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from identity import keys
from services.identityd.caution import HEARTBEAT_S
from services.runtime.clock import Clock
from services.runtime.errors import NotFound
from services.store.model import NO_LEASE, Put, Store, Txn

# As the public key's other writers have it.
LEASE_TTL_S: Final = 900


async def beat(store: Store, clock: Clock) -> None:
    """Until cancelled. Raises `Retry` when the store is away."""
    lease = NO_LEASE
    while True:
        if lease == NO_LEASE or not await store.keep_alive(lease):
            lease = await store.grant(LEASE_TTL_S)
        now = datetime.fromtimestamp(clock.now_s(), UTC).isoformat(timespec="seconds")
        value = now.replace("+00:00", "Z").encode()
        puts = (Put(keys.HEARTBEAT, value, lease), Put(keys.PUBLIC_HEARTBEAT, value, lease))
        try:
            await store.txn(Txn(success=puts))
        except NotFound:
            lease = NO_LEASE
            continue
        await clock.sleep(HEARTBEAT_S)
