"""policyd: accepts, stores, resolves and distributes policy.

    apid --Explain, Diff--> PolicyQuestions (of the State)
    apid --Apply, Delete--> PolicyAdmin --> Policies --> etcd
                              |   ^                       |
                   WaitRealised   | Nodes (acks)          | one watch
                                  |                       v
    agents <--Update-- streams <--+-- Distributor <-- View (State: Resolver, Addresses)

Everything is in etcd, what the agents acknowledge included (Replicas); it may run any number of
times. It serves once the view is complete, so that nobody is ever told half of it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial

import grpc.aio
from opentelemetry.metrics import CallbackOptions, Observation

from identity import labels as label_sets
from identity.configured import ConfiguredIdentities
from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.policy.resolve import Resolver, ResolverSettings
from services.policy.selectors import Kind
from services.policyd.admin import PolicyAdmin
from services.policyd.admission import Limits, Protected
from services.policyd.apply import Policies
from services.policyd.distribute import Distributor
from services.policyd.nodes import Nodes, Pulse
from services.policyd.questions import PolicyQuestions
from services.policyd.records import instance_of
from services.policyd.replicas import Replicas
from services.policyd.state import State
from services.policyd.streams import PolicyDistribution
from services.policyd.view import View
from services.runtime import garbage, metrics, process
from services.runtime.clock import Clock, SystemClock
from services.runtime.config import PolicydConfig
from services.runtime.errors import Invalid
from services.runtime.log import logger
from services.store.model import Store
from services.store.open import open_store
from services.wire.server import serve

log = logger(__name__)


_DEFAULTS = PolicydConfig()


def by_address(cidr_match: str, ipblock_match: str) -> frozenset[str]:
    """The kinds whose CIDRs are matched by address; a ClusterNetworkPolicy knows no other way."""
    found = {Kind.CLUSTER_NETWORK_POLICY}
    if cidr_match == "addresses":
        found |= {Kind.CNP, Kind.CCNP}
    if ipblock_match == "addresses":
        found.add(Kind.NETWORK_POLICY)
    return frozenset(found)


class Policyd:
    """The parts, wired."""

    def __init__(self, store: Store, clock: Clock, config: PolicydConfig = _DEFAULTS) -> None:
        self._store = store
        self._clock = clock
        self.pulse = Pulse()
        # Whether a node's own host is let in is that node's configuration; its agent adds it.
        settings = ResolverSettings(
            allow_localhost=False,
            cluster=config.cluster,
            by_address=by_address(config.cidr_match, config.ipblock_match),
        )
        self.state = State(Resolver(settings))
        self.state.resolver.set_identities(standing_identities(config))
        self.distributor = Distributor(self.state)
        self.nodes = Nodes(self.pulse)
        self.replicas = Replicas(store, self.nodes, clock)
        self.view = View(self.state, self.distributor, self.nodes, self.pulse, clock)
        self.streams = PolicyDistribution(self.distributor, self.nodes, self.view)
        policies = Policies(store, self.state, clock)
        self.questions = PolicyQuestions(self.state)
        self.admin = PolicyAdmin(
            store,
            policies,
            self.state,
            self.view,
            self.nodes,
            self.pulse,
            clock,
            Limits(config.policy_peer_max, tuple(map(Protected.parse, config.protected))),
        )

    def register(self, server: grpc.aio.Server) -> None:
        self.admin.register(server)
        self.questions.register(server)
        self.streams.register(server)

    def checks(self) -> Mapping[str, str]:
        return {"view": "ok" if self.state.synced else "waiting for the store"}

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Entered once the view is complete. Ends what runs inside, and raises, when the view
        cannot go on (see View.follow)."""
        instance = await instance_of(self._store)
        async with asyncio.TaskGroup() as group:
            tasks = (
                group.create_task(self.view.follow(self._store)),
                group.create_task(self.distributor.pace(self._clock)),
                group.create_task(self.replicas.follow()),
                group.create_task(self.replicas.tell()),
            )
            try:
                await self.view.synced()
                self.distributor.listed(instance)
                yield
            finally:
                for task in tasks:
                    task.cancel()


def observe(policyd: Policyd) -> None:
    """Instruments that read what is kept anyway."""
    counts = policyd.distributor.counts
    gauges = {
        "revision": lambda: policyd.state.revision,
        "policies": lambda: len(policyd.state.policies),
        "broken_policies": lambda: len(policyd.state.broken),
        "identities": lambda: policyd.state.identities,
        "addresses": lambda: len(policyd.state.addresses.rows),
        "groups": lambda: policyd.state.groups,
        "subscribers": lambda: len(policyd.distributor.subscriptions),
    }
    counters = {
        "updates_sent": lambda: counts.updates,
        "snapshots_sent": lambda: counts.snapshots,
        "streams_resumed": lambda: counts.resumed,
        "changes_coalesced": lambda: counts.coalesced,
    }
    meter = metrics.meter("tessera.policyd")

    def reading(read: Callable[[], int], _: CallbackOptions) -> Iterable[Observation]:
        return (Observation(read()),)

    for name, read in gauges.items():
        meter.create_observable_gauge(f"tessera_policyd_{name}", [partial(reading, read)])
    for name, read in counters.items():
        meter.create_observable_counter(f"tessera_policyd_{name}", [partial(reading, read)])


def standing_identities(config: PolicydConfig) -> Mapping[NumericIdentity, Labels]:
    try:
        return ConfiguredIdentities(config.cluster, config.fixed_identities).labels
    except label_sets.Invalid as error:
        raise Invalid(f"policyd.fixed_identities: {error}") from None


async def serve_until_stopped(config: PolicydConfig) -> None:
    async with open_store(config.etcd) as store:
        policyd = Policyd(store, SystemClock(), config)
        observe(policyd)
        async with (
            process.serve_metrics(config.metrics_listen, policyd.checks),
            policyd.following(),
            serve(config.listen, policyd.register) as bound,
        ):
            garbage.settled()
            log.info("policyd.serving", listen=bound.target)
            await asyncio.Event().wait()


def main(argv: Sequence[str]) -> None:
    config = process.load_or_exit("policyd", PolicydConfig, argv)
    process.run("policyd", config, partial(serve_until_stopped, config))


if __name__ == "__main__":
    main(sys.argv[1:])
