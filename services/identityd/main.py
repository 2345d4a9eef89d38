"""identityd: numeric identities for label sets, and what nodes publish about their endpoints.

    agents ──gRPC──► IdentityServicer ─┬─► Sessions ───────────────► leases, node keys ──┐
                          │            ├─► Announcer ──────────────► ip keys ────────────┤
                          │            └─► Allocator ──► Committer ► idx, id, ref ───────┤► store
   operators ─► IdentityQueriesDoor        │ decides from                                │
                          └──► IdentityView ◄──────────── watch ─────────────────────────┤
                                   │ idle numbers                                        │
                                   └──► Collector ─────────────────► tomb, deletes ──────┘

Any number of these run side by side; the transactions keep one number per set, one set per number.
"""

from __future__ import annotations

import asyncio
import gc
import random
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

import grpc.aio
from tessera_wire.identity.v1.identity_pb2_grpc import add_IdentityServiceServicer_to_server
from tessera_wire.identity.v1.queries_pb2_grpc import add_IdentityQueriesServicer_to_server

from identity import labels as label_sets
from identity.allocate import FreeNumbers
from identity.configured import ConfiguredIdentities
from identity.numbers import allocatable, reserved_labels
from services.identityd.allocator import Allocator
from services.identityd.announce import Announcer
from services.identityd.gc import Collector
from services.identityd.heartbeat import beat
from services.identityd.queries import IdentityQueries
from services.identityd.query_service import IdentityQueriesDoor
from services.identityd.rules import LabelRules, RulesInForce
from services.identityd.service import IdentityServicer
from services.identityd.session import Sessions
from services.identityd.stats import Counts, observe
from services.identityd.trend import Trend
from services.identityd.view import IdentityView
from services.runtime.clock import Clock, SystemClock
from services.runtime.config import IdentitydConfig
from services.runtime.errors import Invalid
from services.runtime.health import OK
from services.runtime.log import logger
from services.runtime.process import load_or_exit, run, serve_metrics
from services.runtime.tasks import restarting
from services.store.commit import Committer
from services.store.open import open_store
from services.wire.server import serve

log = logger(__name__)

# Objects made until Python looks for cycles (gc.set_threshold). A burst makes some hundred objects
# per identity and hardly a cycle. 10,000 identities: 1.3 s of CPU instead of 1.5 with Python's 700.
COLLECT_EVERY: Final = (50_000, 20, 20)


async def identityd(config: IdentitydConfig, clock: Clock) -> None:
    numbers = own_numbers(config)
    configured = configured_identities(config)
    # Replicas must not choose alike: seeded by the machine.
    chooser = random.Random()
    counts = Counts()
    async with open_store(config.etcd) as store, Committer(store) as committer:
        view = IdentityView(
            store,
            FreeNumbers(numbers, chooser),
            clock,
            standing={**reserved_labels(), **configured.labels},
            pressed_quarantine_s=config.pressed_quarantine_s,
        )
        rules = RulesInForce(label_rules(config))
        observe(counts, view)
        collector = Collector(
            store,
            view,
            counts,
            clock,
            chooser,
            grace_s=config.gc_grace_s,
            quarantine_s=config.quarantine_s,
            session_ttl_s=config.session_ttl_s,
        )
        servicer = IdentityServicer(
            store,
            view,
            Allocator(
                view,
                committer,
                counts,
                clock,
                cluster=config.cluster,
                rules=rules,
                configured=configured,
            ),
            rules,
            Announcer(store, committer, counts, numbers),
            Sessions(
                store,
                counts,
                cluster=config.cluster,
                cluster_id=config.cluster_id,
                ttl_s=config.session_ttl_s,
            ),
            cluster=config.cluster,
            cluster_id=config.cluster_id,
        )

        trend = Trend(view, clock)
        questions = IdentityQueriesDoor(
            view,
            IdentityQueries(view, clock, config.cluster),
            trend,
            clock,
            cluster=config.cluster,
            cluster_id=config.cluster_id,
        )

        def register(server: grpc.aio.Server) -> None:
            add_IdentityServiceServicer_to_server(servicer, server)
            add_IdentityQueriesServicer_to_server(questions, server)

        async with (
            asyncio.TaskGroup() as tasks,
            serve_metrics(config.metrics_listen, partial(_checks, view)),
            serve(config.listen, register) as bound,
        ):
            tasks.create_task(restarting("identity view", view.follow, clock))
            tasks.create_task(restarting("label rules", partial(rules.follow, store), clock))
            tasks.create_task(restarting("heartbeat", partial(beat, store, clock), clock))
            tasks.create_task(restarting("identity trend", trend.count, clock))
            tasks.create_task(restarting("identity samples", trend.sample, clock))
            tasks.create_task(restarting("identity collector", collector.run, clock))
            log.info("identityd.serving", listen=bound.target)
            await asyncio.Event().wait()


def own_numbers(config: IdentitydConfig) -> range:
    try:
        return allocatable(config.cluster_id, config.max_clusters)
    except label_sets.Invalid as error:
        raise Invalid(f"identityd.cluster_id: {error}") from None


def configured_identities(config: IdentitydConfig) -> ConfiguredIdentities:
    try:
        return ConfiguredIdentities(config.cluster, config.fixed_identities)
    except label_sets.Invalid as error:
        raise Invalid(f"identityd.fixed_identities: {error}") from None


def label_rules(config: IdentitydConfig) -> LabelRules:
    return LabelRules(
        config.label_filter, config.policy_relevant, config.namespace_quota, config.warn_values
    )


def _checks(view: IdentityView) -> Mapping[str, str]:
    return {"identities": OK if view.is_synced else "the store has not been read yet"}


def main(argv: Sequence[str]) -> None:
    gc.set_threshold(*COLLECT_EVERY)
    config = load_or_exit("identityd", IdentitydConfig, argv)
    run("identityd", config, partial(identityd, config, SystemClock()))


if __name__ == "__main__":
    main(sys.argv[1:])
