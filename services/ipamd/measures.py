"""What Prometheus is told, observed from the view and the counts when it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict

from opentelemetry.metrics import CallbackOptions, Observation

from ipam.block import Family
from ipam.pool import Pool
from ipam.view import View
from services.ipamd.allocator import Counts
from services.ipamd.collector import Collector
from services.ipamd.usage import Meter
from services.runtime import metrics


def observe(view: View, counts: Counts, usage: Meter, collector: Collector) -> None:
    """Once per process."""
    meter = metrics.meter("tessera.ipamd")

    def per_pool(
        name: str, description: str, value: Callable[[Pool, Family], float | None]
    ) -> None:
        def observed(_options: CallbackOptions) -> Iterable[Observation]:
            for pool in view.pools():
                for family in pool.families:
                    number = value(pool, family)
                    if number is not None:
                        yield Observation(number, {"pool": pool.name, "family": str(family)})

        meter.create_observable_gauge(name, callbacks=[observed], description=description)

    def blocks(pool: Pool, family: Family) -> int:
        return sum(1 for claim in view.blocks_of(pool.name) if claim.block.family is family)

    def operations(_options: CallbackOptions) -> Iterable[Observation]:
        for outcome, count in asdict(counts).items():
            yield Observation(count, {"outcome": outcome})

    def leaks(_options: CallbackOptions) -> Iterable[Observation]:
        yield Observation(len(collector.leaks()), {})

    per_pool("tessera_ipam_used", "Addresses in use.", lambda p, f: view.used(p.name, f))
    per_pool("tessera_ipam_capacity", "Addresses to hand out.", lambda p, f: p.capacity(f))
    per_pool("tessera_ipam_blocks", "Blocks that nodes hold.", blocks)
    per_pool(
        "tessera_ipam_exhaustion_seconds",
        "Until the pool is used up at the last hour's rate; absent while use does not grow.",
        lambda p, f: usage.forecast(p, f)[1],
    )
    meter.create_observable_gauge(
        "tessera_ipam_leaks", callbacks=[leaks], description="Addresses whose owner is doubted."
    )
    meter.create_observable_counter(
        "tessera_ipam_operations",
        callbacks=[operations],
        description="Allocations, releases, addresses kept, borrowed, replayed from nodes and"
        " collected, blocks claimed, transactions lost, requests refused for an exhausted pool.",
    )
