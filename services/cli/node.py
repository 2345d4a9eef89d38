"""One machine's whole node under one supervisor.

    preflight ─► lock ─► tessera.toml ─► etcd ─► TaskGroup(Keeper per process) ─► all ready ─► body
                                                                                      │
    etcd stopped last ◄── children stopped together ◄── (clean_up: endpoints) ◄───────┘

Stopping leaves what the agent pinned in bpffs: attached endpoints stay enforced without a node.
Only `clean_up` takes endpoints and pins away.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cli import client, preflight
from services.cli.layout import (
    ETCD_CLIENT_PORT,
    MODULES,
    PROCESSES,
    Layout,
    Table,
    child_environ,
    dump,
    node_config,
)
from services.cli.supervisor import Keeper, backoff_s, last_words, module_command
from services.runtime import config
from services.runtime.clock import Clock
from services.runtime.errors import TesseraError, Unusable
from services.runtime.etcd_process import EmbeddedEtcd
from services.wire.client import call, channel

# A cold start of six Python processes on a loaded two-core machine takes a third of this.
READY_DEADLINE_S = 90.0
POLL_S = 0.1
PROBE_DEADLINE_S = 2.0
# A child that dies this often before it ever was ready will not come up by itself.
FATAL_DEATHS = 3
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. `etcd_endpoints` empty: an etcd of our own on `etcd_ports` (client, peer)."""

    layout: Layout = field(default_factory=Layout)
    user: Table = field(default_factory=dict)
    etcd_endpoints: tuple[str, ...] = ()
    etcd_ports: tuple[int, int] = (ETCD_CLIENT_PORT, ETCD_CLIENT_PORT + 1)
    verbose: bool = False
    clean_up: bool = False


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the processes of a plan listen, as they themselves will read it."""

    grpc: Mapping[str, str]
    api: str
    agent_socket: Path
    listeners: Mapping[str, str]
    """address -> owner, for the check that it is free."""


@dataclass(frozen=True, slots=True)
class Node:
    addresses: Addresses
    layout: Layout

    @property
    def server(self) -> client.Client:
        return client.server(self.addresses.api)

    @property
    def agent(self) -> client.Client:
        return client.agent(str(self.addresses.agent_socket))


@asynccontextmanager
async def running(plan: Plan, clock: Clock, say: Say) -> AsyncIterator[Node]:
    """The node, ready, while the block runs; `say` gets one line per event worth one."""
    layout = plan.layout
    preflight.require_root("a node")
    if not plan.etcd_endpoints:
        preflight.require_etcd()
    preflight.make_directories(layout)
    if not plan.etcd_endpoints:
        preflight.require_room(layout.etcd_data)
    with preflight.only_one(layout.lock_file, "a Tessera node"):
        if preflight.require_bpffs(layout.bpf_dir):
            say(f"mounted a bpf filesystem on {preflight.BPFFS}")
        etcd = None
        if not plan.etcd_endpoints:
            etcd = EmbeddedEtcd(layout.etcd_data, *plan.etcd_ports, clock=clock)
        addresses = _configure(plan, etcd.endpoint if etcd else "")
        preflight.require_ports(addresses.listeners)
        try:
            async with _started(plan, addresses, etcd, clock, say) as node:
                yield node
        finally:
            if plan.clean_up:
                shutil.rmtree(layout.bpf_dir, ignore_errors=True)


@asynccontextmanager
async def _started(
    plan: Plan, addresses: Addresses, etcd: EmbeddedEtcd | None, clock: Clock, say: Say
) -> AsyncIterator[Node]:
    started_s = clock.monotonic_s()
    async with _etcd(plan, etcd, clock, say), _children(plan, addresses, etcd, clock, say):
        say(f"node ready in {clock.monotonic_s() - started_s:.1f} s: REST {addresses.api}")
        node = Node(addresses, plan.layout)
        try:
            yield node
        finally:
            if plan.clean_up:
                await asyncio.shield(_remove_endpoints(node, say))


def _configure(plan: Plan, own_etcd: str) -> Addresses:
    """Writes the one configuration file; every process's part of it is read back to check it."""
    path = plan.layout.config_file
    tables = node_config(plan.user, plan.layout, plan.etcd_endpoints or (own_etcd,))
    path.touch(mode=0o600)
    path.write_text(dump(tables))
    environ = child_environ(os.environ)
    identityd = config.load(config.IdentitydConfig, "identityd", path, environ)
    ipamd = config.load(config.IpamdConfig, "ipamd", path, environ)
    policyd = config.load(config.PolicydConfig, "policyd", path, environ)
    apid = config.load(config.ApidConfig, "apid", path, environ)
    agent = config.load(config.AgentConfig, "agent", path, environ)
    listeners = {own_etcd: "the embedded etcd", apid.listen: "apid"}
    for name, one in (("identityd", identityd), ("ipamd", ipamd), ("policyd", policyd)):
        listeners |= {one.listen: name, one.metrics_listen: f"{name}'s metrics"}
    listeners[agent.metrics_listen] = "the agent's metrics"
    return Addresses(
        grpc={
            "identityd": identityd.listen,
            "ipamd": ipamd.listen,
            "policyd": policyd.listen,
        },
        api=apid.listen if apid.listen.startswith("unix:") else f"http://{apid.listen}",
        agent_socket=plan.layout.socket("agent"),
        listeners=listeners,
    )


# ------------------------------------------------------------------ starting


@asynccontextmanager
async def _etcd(
    plan: Plan, etcd: EmbeddedEtcd | None, clock: Clock, say: Say
) -> AsyncIterator[None]:
    if etcd is None:
        say(f"{'etcd':<10} external {', '.join(plan.etcd_endpoints)}")
        yield
        return
    started_s = clock.monotonic_s()
    async with etcd:
        where = f"{etcd.endpoint}, data in {plan.layout.etcd_data}"
        say(f"{'etcd':<10} ready after {clock.monotonic_s() - started_s:.1f} s  {where}")
        yield


async def _keep_etcd(etcd: EmbeddedEtcd, clock: Clock, say: Say) -> None:
    """Starts it again whenever it ends by itself."""
    deaths = 0
    while True:
        await etcd.wait()
        deaths += 1
        pause_s = backoff_s(deaths)
        say(f"etcd ended, see {etcd.log_file}; restarting in {pause_s:g} s")
        await clock.sleep(pause_s)
        try:
            await etcd.start()
        except Unusable as error:
            say(str(error))


@asynccontextmanager
async def _children(
    plan: Plan, addresses: Addresses, etcd: EmbeddedEtcd | None, clock: Clock, say: Say
) -> AsyncIterator[None]:
    log_dir = None if plan.verbose else plan.layout.log_dir
    environ = child_environ(os.environ)
    keepers = {
        name: Keeper(
            module_command(name, MODULES[name], plan.layout.config_file, log_dir),
            clock,
            say,
            environ,
        )
        for name in PROCESSES
    }
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(keeper.run(), name=n) for n, keeper in keepers.items()]
            if etcd is not None:
                tasks.append(group.create_task(_keep_etcd(etcd, clock, say), name="etcd"))
            try:
                await _all_ready(keepers, addresses, clock, say)
                yield
            finally:
                for task in tasks:
                    task.cancel()
    except ExceptionGroup as failed:
        # The keepers do not raise; what comes out is the body's own error, wrapped by the group.
        if len(failed.exceptions) == 1:
            raise failed.exceptions[0] from None
        raise


async def _all_ready(
    keepers: Mapping[str, Keeper],
    addresses: Addresses,
    clock: Clock,
    say: Say,
) -> None:
    started_s = clock.monotonic_s()

    async def follow(name: str, keeper: Keeper) -> None:
        check = _check_of(name, addresses)
        while not await check():
            _give_up_if_hopeless(keeper, clock.monotonic_s() - started_s)
            await clock.sleep(POLL_S)
        where = addresses.grpc.get(name) or _other_address(name, addresses)
        say(f"{name:<10} ready after {clock.monotonic_s() - started_s:.1f} s  {where}")

    try:
        async with asyncio.TaskGroup() as group:
            for name, keeper in keepers.items():
                group.create_task(follow(name, keeper))
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


def _give_up_if_hopeless(keeper: Keeper, waited_s: float) -> None:
    command = keeper.command
    if keeper.deaths >= FATAL_DEATHS:
        raise Unusable(f"{command.name} does not start: {last_words(command.log_file)}")
    if waited_s > READY_DEADLINE_S:
        raise Unusable(
            f"{command.name} is not ready after {READY_DEADLINE_S:g} s: "
            f"{last_words(command.log_file)}; see {command.log_file or 'the messages above'}"
        )


def _other_address(name: str, addresses: Addresses) -> str:
    return addresses.api if name == "apid" else f"unix://{addresses.agent_socket}"


def _check_of(name: str, addresses: Addresses) -> Callable[[], Awaitable[bool]]:
    if name == "apid":
        return partial(_answers_http, client.server(addresses.api), "/healthz")
    if name == "agent":
        return partial(_answers_http, client.agent(str(addresses.agent_socket)), "/v1/status")
    return partial(_answers_grpc, addresses.grpc[name])


async def _answers_http(door: client.Client, path: str) -> bool:
    try:
        reply = await asyncio.to_thread(door.exchange, "GET", path, deadline_s=PROBE_DEADLINE_S)
    except TesseraError:
        return False
    return reply.ok


async def _answers_grpc(target: str) -> bool:
    async with channel(target) as opened:
        stub = health_pb2_grpc.HealthStub(opened)
        try:
            answer = await call(
                stub.Check, health_pb2.HealthCheckRequest(), deadline_s=PROBE_DEADLINE_S
            )
        except TesseraError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


# ------------------------------------------------------------------ clean-up


class _Endpoint(msgspec.Struct, frozen=True):
    id: int


class _Endpoints(msgspec.Struct, frozen=True):
    endpoints: tuple[_Endpoint, ...]


async def _remove_endpoints(node: Node, say: Say) -> None:
    try:
        listed = await asyncio.to_thread(node.agent.get, "/v1/endpoints")
        endpoints = msgspec.json.decode(listed, type=_Endpoints).endpoints
        for endpoint in endpoints:
            path = f"/v1/endpoints/{endpoint.id}"
            await asyncio.to_thread(node.agent.request, "DELETE", path)
    except TesseraError as error:
        say(f"endpoints were not removed: {error}")
    else:
        if endpoints:
            say(f"removed {len(endpoints)} endpoints")
