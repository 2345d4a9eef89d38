"""What the etcd client counts about itself, per process.

Calls are counted as plain integers that the meters observe, and one in sixteen is timed: a recorded
measurement costs a tenth of the call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from opentelemetry.metrics import CallbackOptions, Observation

from services.runtime import metrics

TIMED_EVERY: Final = 16
BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


@dataclass(slots=True)
class Counts:
    calls: int = 0
    failures: int = 0
    moves: int = 0
    resumes: int = 0
    relists: int = 0
    leases_lost: int = 0


COUNTS: Final = Counts()

_meter: Final = metrics.meter("tessera.store")

call_seconds: Final = _meter.create_histogram(
    "tessera_store_call",
    unit="s",
    description="Time of a call to etcd, one in sixteen measured.",
    explicit_bucket_boundaries_advisory=BUCKETS_S,
)


def _observe(name: str, field: str, description: str) -> None:
    def read(_options: CallbackOptions) -> Iterable[Observation]:
        yield Observation(getattr(COUNTS, field))

    _meter.create_observable_counter(name, callbacks=[read], description=description)


_observe("tessera_store_calls", "calls", "Calls to etcd, each try counted.")
_observe("tessera_store_failures", "failures", "Calls to etcd that failed, each try counted.")
_observe("tessera_store_moves", "moves", "Changes from one etcd endpoint to another.")
_observe("tessera_store_watch_resumes", "resumes", "Watches resumed after a broken stream.")
_observe("tessera_store_watch_relists", "relists", "Watches that had to list anew.")
_observe("tessera_store_leases_lost", "leases_lost", "Leases found gone at a keep-alive.")
