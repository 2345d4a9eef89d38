"""What identityd counts about itself, observed by the meters when they are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from opentelemetry.metrics import CallbackOptions, Observation

from services.identityd.view import IdentityView
from services.runtime import metrics


@dataclass(slots=True)
class Counts:
    created: int = 0
    referred: int = 0
    conflicts: int = 0
    refused: int = 0
    collected: int = 0
    reused_early: int = 0
    announced: int = 0
    sessions: int = 0


def observe(counts: Counts, view: IdentityView) -> None:
    """Once per process."""
    meter: Final = metrics.meter("tessera.identityd")
    for name, read, description in (
        ("created", lambda: counts.created, "Identities given to label sets that had none."),
        ("referred", lambda: counts.referred, "References taken to identities that existed."),
        ("conflicts", lambda: counts.conflicts, "Transactions lost to another writer, retried."),
        ("refused", lambda: counts.refused, "Label sets that got no identity."),
        ("collected", lambda: counts.collected, "Identities collected after their last use."),
        (
            "reused_early",
            lambda: counts.reused_early,
            "Numbers reused in quarantine.",
        ),
        ("announced", lambda: counts.announced, "Addresses announced."),
        ("sessions", lambda: counts.sessions, "Node sessions opened or resumed."),
    ):
        meter.create_observable_counter(
            f"tessera_identity_{name}", callbacks=[_reading(read)], description=description
        )
    for name, read, description in (
        ("in_use", lambda: view.in_use, "Allocated identities."),
        ("quarantined", lambda: view.in_quarantine, "Numbers that may not be reused yet."),
        ("free", lambda: len(view.free), "Numbers that can be given out."),
        ("references", lambda: view.references, "References that nodes hold."),
    ):
        meter.create_observable_gauge(
            f"tessera_identity_{name}", callbacks=[_reading(read)], description=description
        )


def _reading(read: Callable[[], int]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observed(_options: CallbackOptions) -> Iterable[Observation]:
        yield Observation(read())

    return observed
