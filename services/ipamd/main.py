"""The address service: blocks to nodes, addresses to endpoints.

    config ─► pools.ensure ─► store ◄─── Committer ◄── Reclaimer (empty blocks)
                               │ watch      ▲      ◄── Collector (owners that are gone)
                               ▼            │
                           Follower ─► View ◄── decide ── Allocator ◄── IpamService ◄── gRPC
                                                           ▲  │   ▲
                          windows of nodes ── Windows ─────┘  │   └──── Replayer ── their journals
                                                 CoolDown ◄───┘ leases for released addresses

Serves once the view holds all that is stored. Any number of replicas may run.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from random import Random

import grpc.aio
from tessera_wire.ipam.v1 import ipam_pb2_grpc

from ipam.view import View
from services.ipamd import measures, pools
from services.ipamd.allocator import Allocator
from services.ipamd.collector import Collector
from services.ipamd.cooldown import CoolDown
from services.ipamd.follow import Follower
from services.ipamd.journal import Replayer
from services.ipamd.reclaimer import Reclaimer
from services.ipamd.service import IpamService
from services.ipamd.usage import Meter
from services.ipamd.windows import Windows
from services.runtime import garbage
from services.runtime.clock import Clock, SystemClock
from services.runtime.config import IpamdConfig
from services.runtime.errors import Invalid, Unusable
from services.runtime.health import OK
from services.runtime.log import logger
from services.runtime.process import load_or_exit, run, serve_metrics
from services.runtime.tasks import restarting
from services.store.commit import Committer
from services.store.model import Store
from services.store.open import open_store
from services.wire.server import serve

log = logger(__name__)

PROCESS = "ipamd"


def main(argv: Sequence[str] | None = None) -> None:
    config = load_or_exit(PROCESS, IpamdConfig, sys.argv[1:] if argv is None else argv)
    run(PROCESS, config, lambda: _main(config))


async def _main(config: IpamdConfig) -> None:
    async with open_store(config.etcd) as store:
        await serve_with(config, store, SystemClock())


async def serve_with(
    config: IpamdConfig,
    store: Store,
    clock: Clock,
    listening: asyncio.Future[str] | None = None,
) -> None:
    """Runs until cancelled. `listening` is given the target that clients dial."""
    view = View()
    follower = Follower(store, view)
    committer = Committer(store)
    cooldown = CoolDown(store, clock, config.release_cooldown_s)
    allocator = Allocator(store, committer, view, clock, Random(), cooldown)
    reclaimer = Reclaimer(store, view, clock)
    collector = Collector(store, committer, view, allocator, clock, config.node_gone_s)
    usage = Meter(view, clock)
    service = IpamService(
        store=store,
        view=view,
        allocator=allocator,
        windows=Windows(store, committer, view, allocator, clock, config.node_gone_s),
        replayer=Replayer(store, committer, view, allocator),
        collector=collector,
        usage=usage,
        node_gone_s=config.node_gone_s,
        cooldown_s=config.release_cooldown_s,
    )
    measures.observe(view, allocator.counts, usage, collector)

    def register(server: grpc.aio.Server) -> None:
        ipam_pb2_grpc.add_IpamServiceServicer_to_server(service, server)

    def checks() -> Mapping[str, str]:
        return {"view": OK if follower.synced.is_set() else "not read yet"}

    async def ensure_pools() -> None:
        try:
            await pools.ensure(store, config.pools)
        except Invalid as error:
            raise Unusable(str(error)) from error

    async with (
        serve_metrics(config.metrics_listen, checks),
        committer,
        asyncio.TaskGroup() as tasks,
    ):
        await restarting("pools", ensure_pools, clock)
        tasks.create_task(follower.run(), name="follower")
        await follower.synced.wait()
        garbage.settled()
        tasks.create_task(restarting("reclaimer", reclaimer.run, clock), name="reclaimer")
        tasks.create_task(restarting("collector", collector.run, clock), name="collector")
        tasks.create_task(usage.run(), name="usage")
        async with serve(config.listen, register) as bound:
            log.info("ipamd.serving", listen=bound.target)
            if listening is not None:
                listening.set_result(bound.target)
            await asyncio.Event().wait()


if __name__ == "__main__":
    main()
