"""The node agent: `python -m datapath.agent.main --config FILE`, or `tessera agent`.

    policyd ══► Subscription ══► Enforcement ══► BPF maps ◄── programs on every veth
                 ▲ interest        ▲ rows                        │
    identityd ◄═ Session ◄──┐      │                             │ event ring
    ipamd ◄═ Addressing ◄─ Endpoints ──► links, loader           ▼
                              ▲        └──► Keeper ──► disk    EventLog
                              └── Api on agent.sock ◄────────────┘

Start: lock, checkpoint, programs and maps, take over what the kernel enforces, API, then the
streams. Nothing before the streams needs the control plane. Stop: the streams end, the view is
written; programs, maps and interfaces stay, and go on judging.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, fields
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

from tessera_wire.identity.v1.identity_pb2_grpc import IdentityServiceStub
from tessera_wire.ipam.v1.ipam_pb2_grpc import IpamServiceStub
from tessera_wire.policy.v1.policy_pb2_grpc import PolicyAdminStub, PolicyDistributionStub

from datapath import links
from datapath.agent import api, checkpoint, recovery
from datapath.agent.addressing import Addressing
from datapath.agent.addresslog import AddressLog
from datapath.agent.checkpoint import Journal
from datapath.agent.declared import Declared
from datapath.agent.endpoints import Endpoints
from datapath.agent.enforcement import Enforcement, Realised
from datapath.agent.events import EventLog
from datapath.agent.explain import Explainer
from datapath.agent.hostfirewall import HostFirewall
from datapath.agent.identities import Identities
from datapath.agent.keeper import Keeper
from datapath.agent.known import Known
from datapath.agent.machine import NodeMachine
from datapath.agent.node import Node
from datapath.agent.record import EndpointRecord, State
from datapath.agent.relabel import Everywhere, Relabel
from datapath.agent.session import Session
from datapath.agent.staleness import Staleness
from datapath.agent.status import Status
from datapath.agent.subscribe import Door, Subscription
from datapath.agent.tools_api import ToolsApi
from datapath.agent.underlay import Underlay, attach, prepare, roles
from datapath.agent.verify import Verifier
from datapath.agent.view import View
from datapath.cni.service import Cni
from datapath.loader import AttachMode, Datapath
from datapath.maps.layout import mapped
from datapath.maps.tables import Sizes
from services.runtime.clock import Clock, SystemClock
from services.runtime.config import AgentConfig, targets
from services.runtime.errors import Unusable
from services.runtime.log import logger
from services.runtime.process import load_or_exit, run, serve_metrics
from services.wire.client import channel

log = logger(__name__)

OBJECT = Path(__file__).parent.parent / "bpf" / "tessera.o"
OWN_ADDRESSES_PAUSE_S = 30.0
# A tcx attachment waits for a grace period under the kernel's one network lock: an endpoint took
# 52 ms instead of 28, and twelve at once 590 ms. Attachments that exist stay what they are.
ATTACH: Final[Mapping[str, AttachMode]] = {"auto": "clsact", "tcx": "tcx", "clsact": "clsact"}


@dataclass(frozen=True, slots=True)
class Restored:
    """What an earlier run left: on disk, and in the kernel."""

    journal: Journal
    view: View
    heard_s: float
    datapath: Datapath
    own: tuple[IPv4Address | IPv6Address, ...]
    node_ip: str
    underlay: Underlay
    addresses: AddressLog


def main(argv: Sequence[str] | None = None) -> None:
    config = load_or_exit("agent", AgentConfig, sys.argv[1:] if argv is None else argv)
    run("agent", config, lambda: agent(config))


async def agent(config: AgentConfig) -> None:
    clock = SystemClock()
    if os.geteuid() != 0:
        raise Unusable("the agent needs root (CAP_BPF, CAP_NET_ADMIN): run it as root")
    with api.only_agent(Path(config.run_dir)):
        # In a thread: it blocks, and netlink brings a loop of its own.
        restored = await asyncio.to_thread(restore, config)
        try:
            await serve(config, clock, restored)
        finally:
            restored.datapath.close()
            restored.addresses.close()


def restore(config: AgentConfig) -> Restored:
    """Checks the machine, reads the checkpoint, loads programs and maps. Raises `Unusable` in one
    line that says what to do."""
    state_dir = Path(config.state_dir)
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise Unusable(f"cannot make [agent] state_dir {state_dir}: {error.strerror}") from None
    sizes = Sizes(**{one.name: getattr(config, one.name) for one in fields(Sizes)})
    view = checkpoint.load_view(state_dir) or View()
    journal = checkpoint.load_journal(state_dir)
    loaded = Datapath.open(
        Path(config.bpf_object) if config.bpf_object else OBJECT,
        Path(config.bpf_dir),
        sizes,
        attach=ATTACH[config.attach],
        log_dir=state_dir,
        roles=roles(config),
    )
    links.ensure_forwarding()
    if journal is None:
        rows = dict(loaded.tables.endpoints.items())
        journal = recovery.adopt(rows, view, recovery.interfaces())
    own = own_addresses()
    node_ip = config.node_ip or _first(own)
    underlay = prepare(config, node_ip)
    heard_s = checkpoint.heard_s(state_dir)
    return Restored(journal, view, heard_s, loaded, own, node_ip, underlay, AddressLog(state_dir))


async def serve(config: AgentConfig, clock: Clock, restored: Restored) -> None:
    started_s = clock.monotonic_s()
    loaded, view, journal = restored.datapath, restored.view, restored.journal
    node, jitter = config.node_name, random.Random()
    known = Known(journal.known)
    node_ip = restored.node_ip

    enforcement = Enforcement(
        loaded.tables,
        view,
        own_nodes=frozenset((node, node_ip)),
        allow_localhost=config.allow_localhost,
        tunnelled=config.routing == "overlay",
    )
    firewall = HostFirewall(config, enforcement, loaded.tables.control)
    take_over(enforcement, firewall, restored, node)

    async with AsyncExitStack() as stack:
        to_identityd = await stack.enter_async_context(channel(config.identityd))
        to_ipamd = await stack.enter_async_context(channel(config.ipamd))
        to_policyd = {
            one: await stack.enter_async_context(channel(one)) for one in targets(config.policyd)
        }
        doors = [Door(one, PolicyDistributionStub(way)) for one, way in to_policyd.items()]

        events = EventLog(
            loaded.ring,
            loaded.tables.metrics,
            Explainer(view, lambda: endpoints.records),
            clock,
            node=node,
        )
        session = Session(
            IdentityServiceStub(to_identityd),
            node=node,
            node_ip=node_ip,
            node_ip6=_first6(restored.own),
            previous_lease=journal.lease,
            republish=lambda: endpoints.republish(),
            on_lease=lambda: keeper.save(),
            held=lambda: len(endpoints.records),
            clock=clock,
            jitter=jitter,
        )
        keeper = Keeper(
            Path(config.state_dir),
            lambda: Journal(endpoints.next_id, session.lease, endpoints.records, known.remembered),
            view,
            clock,
            lambda: subscription.heard_s,
        )
        whole = Node(
            config,
            view,
            {node_ip, *map(str, restored.own)},
            restored.underlay,
            loaded.tables,
            firewall,
            clock,
        )
        staleness = Staleness(
            lambda: subscription.heard_s, clock, config.stale_after_s, config.when_stale
        )
        subscription = Subscription(
            doors,
            heard_s=restored.heard_s,
            admit=staleness.admit,
            node=node,
            enforcement=enforcement,
            clock=clock,
            jitter=jitter,
            before=events.about_to_change,
            on_realised=lambda done: followed(done, keeper, whole),
        )
        identities = Identities(
            session,
            known,
            in_use=lambda: frozenset(record.identity for record in endpoints.records),
            owing=lambda: relabel.due(),
            unknown_as_init=config.unknown_labels == "init",
            clock=clock,
        )
        machine = NodeMachine(loaded, restored.underlay.mtu)
        networks = await asyncio.to_thread(links.node_networks)
        addressing = Addressing(
            IpamServiceStub(to_ipamd),
            node,
            journal=restored.addresses,
            records=lambda: endpoints.records,
            networks=lambda: networks,
            clock=clock,
        )
        endpoints = Endpoints(
            node=node,
            identities=identities,
            addresses=addressing,
            policies=subscription,
            rows=enforcement,
            machine=machine,
            save=keeper.save,
            before_forgetting=events.about_to_change,
            on_renumbered=lambda: relabel.due(),
            clock=clock,
            next_id=journal.next_id,
            records=journal.endpoints,
        )
        everywhere = Everywhere([PolicyAdminStub(way) for way in to_policyd.values()], clock)
        relabel = Relabel(endpoints, identities, everywhere, clock)
        status = Status(
            node=node,
            node_ip=node_ip,
            started_s=started_s,
            clock=clock,
            enforcement=enforcement,
            endpoints=endpoints,
            addressing=addressing,
            session=session,
            subscription=subscription,
            events=events,
            staleness=staleness,
            whole=whole,
        )
        status.observe()
        await addressing.settle()

        door = api.Api(endpoints, events, status.report, relabel.done).application()
        verifier = Verifier(
            loaded.tables,
            enforcement,
            loaded,
            lambda: {r.ifindex: r.outer for r in endpoints.records if r.state is State.READY},
        )
        door.add_routes(ToolsApi(verifier, view, firewall).routes())
        cni = Cni(endpoints, machine, status.away, vanished, Path(config.labels_dir))
        door.add_routes(cni.routes())
        await stack.enter_async_context(serve_metrics(config.metrics_listen, status.checks))
        await stack.enter_async_context(api.serve(door, Path(config.run_dir) / api.SOCKET_NAME))
        log.info(
            "agent.ready",
            node=node,
            address=node_ip,
            count=len(endpoints.records),
            took_s=round(clock.monotonic_s() - started_s, 3),
        )
        activities = (
            session.run(),
            session.follow_rules(relabel.due),
            relabel.run(),
            subscription.run(),
            keeper.run(),
            addressing.run(),
            events.run(),
            whole.run(subscription.want),
            endpoints.tidy(vanished),
            Declared(Path(config.endpoints_dir), endpoints, clock).run(),
            follow_own_addresses(enforcement, clock),
        )
        async with asyncio.TaskGroup() as group:
            for activity in activities:
                group.create_task(activity)


def followed(done: Realised, keeper: Keeper, whole: Node) -> None:
    keeper.view_changed()
    whole.follow(done.change)


def take_over(
    enforcement: Enforcement, firewall: HostFirewall, restored: Restored, node: str
) -> None:
    """The endpoints that are still there go on being judged; the programs are exchanged after the
    tables are in order, so that a new program never meets an old table."""
    loaded, there = restored.datapath, recovery.interfaces()
    here = [
        r
        for r in restored.journal.endpoints
        if r.state is State.READY and recovery.present(r, there)
    ]
    rows = {r.ifindex: r.row() for r in here} | firewall.recovered()
    ops = enforcement.recover(rows, map(mapped, restored.own))
    loaded.tables.config.put_many({0: restored.underlay.settings})
    replaced = loaded.replace_programs()
    attached = loaded.attached()
    for record in here:
        if record.outer not in attached:
            loaded.attach(record.ifindex, record.outer)
            log.warning("endpoint.reattached", endpoint=record.ref, interface=record.outer)
    attach(loaded, restored.underlay, node)
    log.info("agent.took_over", count=len(here), rows=ops.rows(), changed=replaced)


def vanished(records: Sequence[EndpointRecord]) -> list[EndpointRecord]:
    there = recovery.interfaces()
    return [record for record in records if not recovery.present(record, there)]


def own_addresses() -> tuple[IPv4Address | IPv6Address, ...]:
    return (*links.node_addresses(), *links.node_addresses6())


async def follow_own_addresses(enforcement: Enforcement, clock: Clock) -> None:
    """Until cancelled: the node's addresses come and go (DHCP, new links)."""
    while True:
        await clock.sleep(OWN_ADDRESSES_PAUSE_S)
        enforcement.own_addresses(map(mapped, await asyncio.to_thread(own_addresses)))


def _first6(addresses: Sequence[IPv4Address | IPv6Address]) -> str:
    """Empty: none that other nodes could reach."""
    found = (a for a in addresses if a.version == 6 and not a.is_link_local)
    return str(next(found, ""))


def _first(addresses: Sequence[IPv4Address | IPv6Address]) -> str:
    for address in addresses:
        if address.version == 4:
            return str(address)
    raise Unusable("this node has no IPv4 address but loopback: set [agent] node_ip")


if __name__ == "__main__":
    main()
