"""What the agent says of itself: one value for /v1/status, /healthz and the metrics."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from opentelemetry.metrics import CallbackOptions, Observation

from datapath.agent.addressing import Addressing
from datapath.agent.endpoints import Endpoints
from datapath.agent.enforcement import Enforcement
from datapath.agent.events import EventLog
from datapath.agent.node import Node
from datapath.agent.record import State
from datapath.agent.session import Session
from datapath.agent.staleness import Staleness
from datapath.agent.subscribe import Subscription
from services.runtime.clock import Clock
from services.runtime.metrics import meter

OK = "ok"


@dataclass(frozen=True, slots=True)
class Status:
    node: str
    node_ip: str
    started_s: float
    clock: Clock
    enforcement: Enforcement
    endpoints: Endpoints
    addressing: Addressing
    session: Session
    subscription: Subscription
    events: EventLog
    staleness: Staleness
    whole: Node

    def report(self) -> dict[str, object]:
        records = self.endpoints.records
        return {
            "node": self.node,
            "node_ip": self.node_ip,
            "pid": os.getpid(),
            "uptime_s": round(self.clock.monotonic_s() - self.started_s, 1),
            "rss_bytes": rss_bytes(),
            "identityd": _door(self.session.error, connected=self.session.connected),
            "policyd": _door(self.subscription.error, connected=self.subscription.connected),
            "policy_age_s": round(self.staleness.age_s, 1),
            "stale": self.staleness.words(),
            "revision": self.enforcement.view.revision,
            "realised": self.subscription.realised.revision,
            "failures": {
                str(identity): reason for identity, reason in self.enforcement.failures.items()
            },
            "endpoints": {
                state.value: count
                for state in State
                if (count := sum(record.state is state for record in records))
            },
            "addresses": self.addressing.status(),
            "policy": self.enforcement.counts(),
            "known": {
                "addresses": len(self.enforcement.view.addresses),
                "groups": len(self.enforcement.view.groups),
                "rules": len(self.enforcement.view.rules),
            },
            **self.whole.report(),
            "events": {
                "seen": self.events.seen,
                "lost": self.events.lost,
                "backlog": round(self.events.backlog, 3),
            },
        }

    def away(self) -> str:
        """What no endpoint can be made without; empty: nothing is missing."""
        doors = (("identityd", self.session), ("policyd", self.subscription))
        missing = (f"{name}: {door.error}" for name, door in doors if not door.connected)
        return next(missing, "")

    def checks(self) -> Mapping[str, str]:
        """For /healthz: what is enforced, not whether the control plane answers; without it the
        node keeps enforcing."""
        failures = self.enforcement.failures
        if not failures:
            return {"policy": self.staleness.words() or OK}
        identity, reason = next(iter(failures.items()))
        return {"policy": f"{len(failures)} identities are behind; {identity}: {reason}"}

    def observe(self) -> None:
        """Registers the metrics."""
        self.staleness.observe()
        instruments = meter("tessera.agent")

        def gauge(name: str, what: str, key: str) -> None:
            def read(_options: CallbackOptions) -> Iterable[Observation]:
                yield Observation(self.enforcement.counts()[key])

            instruments.create_observable_gauge(name, [read], description=what)

        gauge("tessera_agent_endpoints", "Endpoints judged on this node", "endpoints")
        gauge("tessera_agent_policy_slots", "Policy slots in use", "slots")
        gauge("tessera_agent_policy_classes", "Distinct sets of port rows", "classes")
        gauge("tessera_agent_policy_peer_rows", "Rows of the policy_peer map", "peer_rows")
        gauge("tessera_agent_policy_peer_capacity", "Rows it has room for", "peer_capacity")

        def revision(_options: CallbackOptions) -> Iterable[Observation]:
            yield Observation(self.subscription.realised.revision)

        def failures(_options: CallbackOptions) -> Iterable[Observation]:
            yield Observation(len(self.enforcement.failures))

        def events(_options: CallbackOptions) -> Iterable[Observation]:
            yield Observation(self.events.seen, {"state": "seen"})
            yield Observation(self.events.lost, {"state": "lost"})

        instruments.create_observable_gauge(
            "tessera_agent_realised_revision", [revision], description="Revision in the kernel"
        )
        instruments.create_observable_gauge(
            "tessera_agent_policy_failures",
            [failures],
            description="Identities whose newest policy is not in force",
        )
        instruments.create_observable_counter(
            "tessera_agent_events", [events], description="Events of the datapath"
        )


def _door(error: str, *, connected: bool) -> str:
    return "connected" if connected else error


def rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
