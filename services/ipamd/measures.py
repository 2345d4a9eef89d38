"""What Prometheus is told, observed from the view and the counts when it asks."""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry.metrics import CallbackOptions, Observation

from ipam.view import View
from services.ipamd.allocator import Counts
from services.runtime import metrics


def observe(view: View, counts: Counts) -> None:
    """Once per process."""
    meter = metrics.meter("tessera.ipamd")

    def used(_options: CallbackOptions) -> Iterable[Observation]:
        for pool in view.pools():
            yield Observation(view.used(pool.name), {"pool": pool.name})

    def capacity(_options: CallbackOptions) -> Iterable[Observation]:
        for pool in view.pools():
            yield Observation(pool.capacity, {"pool": pool.name})

    def blocks(_options: CallbackOptions) -> Iterable[Observation]:
        for pool in view.pools():
            held = sum(1 for _ in view.blocks_of(pool.name))
            yield Observation(held, {"pool": pool.name})

    def operations(_options: CallbackOptions) -> Iterable[Observation]:
        for outcome in ("allocated", "released", "borrowed", "claimed", "lost", "exhausted"):
            yield Observation(getattr(counts, outcome), {"outcome": outcome})

    meter.create_observable_gauge(
        "tessera_ipam_used", callbacks=[used], description="Addresses in use."
    )
    meter.create_observable_gauge(
        "tessera_ipam_capacity", callbacks=[capacity], description="Addresses a pool can hand out."
    )
    meter.create_observable_gauge(
        "tessera_ipam_blocks", callbacks=[blocks], description="Blocks that nodes hold."
    )
    meter.create_observable_counter(
        "tessera_ipam_operations",
        callbacks=[operations],
        description="Allocations, releases, borrowed addresses, claimed blocks, transactions lost,"
        " requests refused for an exhausted pool.",
    )
