"""The demo from beginning to end, on a node that runs already or on one of its own.

refuse if others' objects are there ─► remove leftovers ─► namespaces ─► endpoints (agent)
  ─► policies (apid), wait N of N ─► probes at once ─► the open connection ─► flow events ─► rows
and back down in reverse, on failure and Ctrl-C too
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from services.cli import client, node, preflight, views
from services.cli.apply import Request, apply_all, delete_one, waited
from services.cli.client import Client
from services.cli.demo import evidence, netns, scenario, traffic
from services.cli.demo.evidence import Row, Shot
from services.cli.demo.scenario import HOST, STATION, STRANGER, Probe, Seen, Workload
from services.cli.demo.traffic import Sent, Station, Talk
from services.cli.layout import Layout, Table
from services.flows.flow import Flow, decode_line
from services.runtime.clock import SystemClock
from services.runtime.errors import Conflict, Invalid, Retry

LOCK_FILE = Path("/run/tessera-demo.lock")
# Not the default pool: a node of the operator's own may be running with that.
OWN_POOL = "10.231.0.0/16"
REALISED_DEADLINE_S = 30.0
ADD_DEADLINE_S = 60.0
EVIDENCE_DEADLINE_S = 5.0
EVIDENCE_POLL_S = 0.1

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Doors:
    server: Client
    agent: Client


@dataclass(frozen=True, slots=True)
class Report:
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        return all(row.right for row in self.rows)

    def to_json(self) -> bytes:
        return msgspec.json.encode({"probes": [row.to_dict() for row in self.rows]})


def running_node(server: str, agent_socket: str) -> Doors | None:
    """None when neither door opens; raises `Retry` when only one does."""
    doors = Doors(client.server(server), client.agent(agent_socket))
    closed = []
    for door in (doors.server, doors.agent):
        try:
            door.exchange("GET", "/v1/status", deadline_s=node.PROBE_DEADLINE_S)
        except Retry as error:
            closed.append(error)
    if len(closed) == 1:
        raise closed[0]
    return None if closed else doors


async def on_own_node(tell: Say) -> Report:
    """On a node of its own in temporary directories, removed with everything in it."""
    with tempfile.TemporaryDirectory(prefix="tessera-demo-") as folder:
        root = Path(folder)
        plan = node.Plan(
            layout=Layout(root / "state", root / "run", preflight.BPFFS / root.name),
            user=_own_config(),
            etcd_ports=(0, 0),
            clean_up=True,
        )
        async with node.running(plan, SystemClock(), tell) as running:
            return await on_node(Doors(running.server, running.agent), tell)


def _own_config() -> Table:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet: Table = {"metrics_listen": ""}
    return {
        "identityd": dict(quiet),
        "ipamd": {**quiet, "pools": {"default": {"cidrs": [OWN_POOL], "block_size": 26}}},
        "policyd": dict(quiet),
        "agent": dict(quiet),
        "apid": {"listen": f"127.0.0.1:{port}"},
    }


async def on_node(doors: Doors, tell: Say, *, keep: bool = False) -> Report:
    """Raises `Conflict` when the node has endpoints or policies that are not the demo's."""
    preflight.require_root("the demo")
    with preflight.only_one(LOCK_FILE, "the demo"):
        await asyncio.to_thread(_refuse_others, doors)
        await asyncio.to_thread(_take_down, doors)
        try:
            return await _staged(doors, tell)
        finally:
            if not keep:
                await asyncio.shield(asyncio.to_thread(_take_down, doors))


async def _staged(doors: Doors, tell: Say) -> Report:
    stations = _build_namespaces()
    async with traffic.listening(stations.values()):
        addresses = await _add_endpoints(doors, stations)
        tell(f"{len(scenario.WORKLOADS)} endpoints are ready")
        notes = await asyncio.to_thread(_apply, doors.server)
        tell("every policy is applied and realised")
        rows = await _probe(doors, stations, addresses)
    return Report(rows, notes)


# ------------------------------------------------------------------ whose objects


def _endpoints(agent: Client) -> tuple[views.Endpoint, ...]:
    return views.decode(agent.get("/v1/endpoints"), views.Endpoints).endpoints


def _policies(server: Client) -> tuple[views.StoredPolicy, ...]:
    return views.decode(server.all_of("/v1/policies", "policies"), views.StoredPolicies).policies


def _refuse_others(doors: Doors) -> None:
    why = (
        "the demo applies a cluster-wide policy that would change what it may do; "
        "run it on a node of its own: tessera demo --isolated"
    )
    for endpoint in _endpoints(doors.agent):
        if scenario.MARK not in endpoint.labels:
            raise Conflict(f"endpoint {endpoint.ref} is not the demo's: {why}")
    for policy in _policies(doors.server):
        if policy.author != scenario.AUTHOR:
            raise Conflict(f"{policy} is not the demo's: {why}")


def _take_down(doors: Doors) -> None:
    """Everything that carries the demo's mark, this run's or a killed one's."""
    try:
        for endpoint in _endpoints(doors.agent):
            if scenario.MARK in endpoint.labels:
                doors.agent.request(
                    "DELETE", f"/v1/endpoints/{endpoint.id}", deadline_s=ADD_DEADLINE_S
                )
        for policy in _policies(doors.server):
            if policy.author == scenario.AUTHOR:
                delete_one(doors.server, policy, scenario.AUTHOR)
    finally:
        netns.remove_all()


# ------------------------------------------------------------------ setting up


def _build_namespaces() -> dict[str, Station]:
    outside = netns.create_outside(
        scenario.OUTSIDE_GATEWAY, (STATION, STRANGER), scenario.OUTSIDE_PREFIX
    )
    stations = {
        HOST: Station(netns.Netns()),
        STATION: Station(outside, STATION, tcp=scenario.STATION_TCP),
        STRANGER: Station(outside, STRANGER),
    }
    for workload in scenario.WORKLOADS:
        stations[workload.ref] = Station(
            netns.create(workload.name), tcp=workload.tcp, udp=workload.udp
        )
    return stations


async def _add_endpoints(doors: Doors, stations: Mapping[str, Station]) -> dict[str, str]:
    """Addresses by the name probes use."""
    addresses = {STATION: STATION, STRANGER: STRANGER}

    async def add(workload: Workload) -> None:
        wanted = {
            "namespace": workload.namespace,
            "name": workload.name,
            "labels": workload.labels,
            "netns": str(stations[workload.ref].netns.path),
            "interface": "eth0",
        }
        body = await asyncio.to_thread(
            doors.agent.request,
            "POST",
            "/v1/endpoints",
            body=msgspec.json.encode(wanted),
            headers={"content-type": "application/json"},
            deadline_s=ADD_DEADLINE_S,
        )
        addresses[workload.ref] = views.decode(body, views.NewEndpoint).ip

    await _all(add(workload) for workload in scenario.WORKLOADS)
    return addresses


def _apply(server: Client) -> tuple[str, ...]:
    """What the server keeps but does not enforce yet, in its own words."""
    for namespace, files in scenario.manifests().items():
        request = Request(files, namespace, scenario.AUTHOR)
        outcome = apply_all(server, request, "", REALISED_DEADLINE_S)
        if outcome.refused:
            raise Invalid("; ".join(str(problem) for problem in outcome.problems))
        if outcome.failed:
            raise Retry(outcome.realised_line())
    stored = _policies(server)
    return tuple(f"{one}: {one.state}" for one in stored if one.state not in ("", "enforced"))


# ------------------------------------------------------------------ probing


async def _probe(
    doors: Doors, stations: Mapping[str, Station], addresses: Mapping[str, str]
) -> tuple[Row, ...]:
    shots: dict[int, Shot] = {}

    async def one(at: int, probe: Probe) -> None:
        target = addresses[probe.target]
        shots[at] = Shot(probe, await _send(probe, stations[probe.source], target), target)

    stream = scenario.STREAM
    target = addresses[stream.target]
    with Talk(stations[stream.source], socket.SOCK_STREAM) as talk:
        opened = await talk.open(target, stream.port, traffic.PATIENCE_S)
        await _all(one(at, probe) for at, probe in enumerate(scenario.PROBES))
        before = (*(shots[at] for at in sorted(shots)), Shot(stream, opened, target, "kept open"))
        # Before the policy goes: the node names a flow's rule only while it has the rule.
        rows = await _explained(doors.agent, before)
        await asyncio.to_thread(_withdraw, doors.server)
        cut = await talk.ask(traffic.SILENCE_S)
    after = Shot(scenario.STREAM_CUT, cut, target, "still open, its allow deleted")
    return rows + await _explained(doors.agent, (after,))


async def _explained(agent: Client, shots: Sequence[Shot]) -> tuple[Row, ...]:
    """From the node's flows once they explain every shot, or what there is at the deadline."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + EVIDENCE_DEADLINE_S
    flows = await asyncio.to_thread(_flows, agent)
    while loop.time() < deadline_s and not all(evidence.explained(one, flows) for one in shots):
        await asyncio.sleep(EVIDENCE_POLL_S)
        flows = await asyncio.to_thread(_flows, agent)
    return tuple(evidence.row(shot, flows) for shot in shots)


async def _send(probe: Probe, source: Station, target: str) -> Sent:
    patience_s = traffic.SILENCE_S if probe.expected is Seen.DROPPED else traffic.PATIENCE_S
    if probe.proto == "ICMP":
        return await traffic.ping(source, target, patience_s)
    kind = socket.SOCK_STREAM if probe.proto == "TCP" else socket.SOCK_DGRAM
    with Talk(source, kind) as talk:
        return await talk.open(target, probe.port, patience_s)


def _withdraw(server: Client) -> None:
    deleted = delete_one(server, scenario.STREAM_POLICY, scenario.AUTHOR)
    outcome = waited(server, deleted, REALISED_DEADLINE_S)
    if outcome.failed:
        raise Retry(outcome.realised_line())


def _flows(agent: Client) -> tuple[Flow, ...]:
    return tuple(decode_line(line) for line in agent.lines("/v1/events"))


async def _all(work: Iterable[Coroutine[None, None, None]]) -> None:
    """Together; the first error is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
