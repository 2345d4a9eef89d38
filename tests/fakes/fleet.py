"""Simulated nodes in a process of their own, asked over its standard input.

    python -m tests.fakes.fleet --config FILE --count 200
        state             how many are connected and enforce, revisions, bytes
        times REVISION    when each node had it in its tables (perf_counter, seconds)
        check ENDPOINTS   compares each node's tables with those made from the store alone
        spoil             writes one wrong row into one node's tables

One JSON document per line in answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from tessera_wire.policy.v1.policy_pb2 import Update

from datapath.agent.enforcement import Enforcement, Realised
from datapath.agent.received import update_from_wire
from datapath.agent.session import Announced, Granted, Sets
from datapath.agent.view import View
from datapath.maps.layout import IpcacheEntry, Verdict
from datapath.maps.tables import Tables
from datapath.reconcile import read
from datapath.simnode.main import Fleet, Plan, allow_files, arguments
from datapath.simnode.node import Identities, SimNode
from identity.numbers import NumericIdentity
from services.policy.clauses import Direction
from services.policy.resolve import Resolver, ResolverSettings
from services.policyd.distribute import Distributor
from services.policyd.state import PREFIXES, State
from services.runtime import config as configuration
from services.runtime import log as logging_setup
from services.runtime.clock import SystemClock
from services.runtime.config import AgentConfig, EtcdConfig, targets
from services.store.model import Synced
from services.store.open import open_store
from tests.fakes.kernel_lookup import judge

PROBES = ((6, 80), (6, 81), (6, 443), (17, 53))


class Preset(Identities):
    """Numbers that stand in the store already: of `app=sim-N` it is FIRST + N."""

    FIRST = 1000

    async def live(self) -> None:
        pass

    async def refer(self, sets: Sets) -> dict[tuple[str, ...], Granted]:
        return {labels: Granted(self.number(labels), 1) for labels in sets}

    def number(self, labels: tuple[str, ...]) -> NumericIdentity:
        return NumericIdentity(self.FIRST + int(labels[0].rpartition("-")[2]))

    async def announce(self, items: Sequence[Announced]) -> None:
        pass


class PresetFleet(Fleet):
    def identities(self, at: int, stub: object) -> tuple[Identities, None]:
        return Preset(), None


class Watched:
    """A fleet, and when what was realised."""

    def __init__(self, fleet_of: Any) -> None:
        self.times: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
        self.enforced: dict[str, float] = {}
        self.started_s = time.perf_counter()
        self.fleet: Fleet = fleet_of(self._realised)

    def _realised(self, node: SimNode, realised: Realised) -> None:
        if node.name not in self.enforced and self._knows_all(node):
            self.enforced[node.name] = time.perf_counter()
        seen = self.times[node.name]
        seen.append((realised.revision, time.perf_counter()))
        del seen[:-64]

    def _knows_all(self, node: SimNode) -> bool:
        numbers = node.numbers.values()
        problem_of = node.enforcement.problem_of
        return len(node.numbers) == len(node.endpoints) and not any(map(problem_of, numbers))

    async def answer(self, words: list[str]) -> object:
        match words:
            case ["state"]:
                return self._state()
            case ["times", revision]:
                return self._times(int(revision))
            case ["check", endpoints]:
                return await check(self.fleet.nodes, endpoints.split(","))
            case ["spoil"]:
                return spoil(self.fleet.nodes)
        raise AssertionError(words)

    def _state(self) -> dict[str, object]:
        nodes = self.fleet.nodes
        revisions = [node.subscription.realised.revision for node in nodes] or [0]
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "nodes": len(nodes),
            "connected": sum(node.subscription.connected for node in nodes),
            "enforcing": sum(node.enforcing for node in nodes),
            "lowest": min(revisions),
            "highest": max(revisions),
            "bytes": self.fleet.decoder.bytes_received,
            "messages": self.fleet.decoder.messages,
            "enforced_s": max(self.enforced.values(), default=0) - self.started_s,
            "cpu_s": usage.ru_utime + usage.ru_stime,
        }

    def _times(self, revision: int) -> list[float]:
        found = []
        for seen in self.times.values():
            first = next((at for reached, at in seen if reached >= revision), None)
            if first is not None:
                found.append(first)
        return found


def spoil(nodes: list[SimNode]) -> str:
    node = random.choice(nodes)
    node.tables.ipcache4.put_many({0x7F000099: IpcacheEntry(4242)})
    return node.name


async def check(nodes: list[SimNode], endpoints: list[str]) -> dict[str, object]:
    state = await listed(endpoints)
    distributor = Distributor(state)
    differing = {}
    for node in nodes:
        problem = difference(node, fresh(node, distributor))
        if problem:
            differing[node.name] = problem
    return {"checked": len(nodes), "differing": differing, "revision": state.revision}


async def listed(endpoints: list[str]) -> State:
    """From the store alone, as a policyd that starts now."""
    state = State(Resolver(ResolverSettings(allow_localhost=False)))
    async with open_store(EtcdConfig(endpoints=tuple(endpoints))) as store:
        async for events in store.watch(*PREFIXES):
            state.apply(events)
            if any(isinstance(event, Synced) for event in events):
                return state
    raise AssertionError("the store was closed")


def fresh(node: SimNode, distributor: Distributor) -> Tables:
    """What the node's tables are when it is told everything at once."""
    tables = Tables.memory()
    rows = dict(node.tables.endpoints.items())
    own = {int(a) for a, e in node.tables.ipcache4.items() if e.identity == 1}
    names = frozenset((node.name, node.ip))
    enforcement = Enforcement(tables, View(), own_nodes=names)
    enforcement.recover({}, own)
    identities = set(node.numbers.values())
    with distributor.subscribed(node.name, identities) as outlet:
        enforcement.realise([update_from_wire(Update.FromString(m)) for m in outlet.take()])
    for at, row in rows.items():
        enforcement.add_endpoint(at, row)
    return tables


def difference(node: SimNode, expected: Tables) -> str:
    for name, table in (("ipcache4", "ipcache"), ("ipcache4_prefix", "prefixes")):
        mine, theirs = (getattr(read(t), table) for t in (node.tables, expected))
        if mine != theirs:
            wrong = {k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k)}
            return f"{name}: {len(wrong)} rows differ, such as {sorted(map(str, wrong))[0]}"
    if len(node.numbers) != len(node.endpoints):
        return f"{len(node.endpoints) - len(node.numbers)} endpoints are not there"
    mine, theirs = answers(node.tables), answers(expected)
    wrong = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
    return f"{len(wrong)} answers differ, such as {wrong[0]}" if wrong else ""


def answers(tables: Tables) -> dict[tuple[object, ...], tuple[Verdict, int]]:
    peers = {0, 1, 2}
    for rows in read(tables).peers.values():
        for members in rows.values():
            peers.update(members)
    found = {}
    seen = set()
    for _, row in tables.endpoints.items():
        if row.identity in seen:
            continue
        seen.add(row.identity)
        for direction, slot in ((Direction.INGRESS, row.slot_in), (Direction.EGRESS, row.slot_out)):
            for peer in peers:
                for proto, port in PROBES:
                    key = (row.identity, direction, peer, proto, port)
                    found[key] = judge(tables, slot, peer, proto, port)
    return found


async def serve(watched: Watched) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(watched.fleet.run())
        while line := await reader.readline():
            answer = await watched.answer(line.decode().split())
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        running.cancel()


def main() -> None:
    given = arguments(sys.argv[1:])
    config = configuration.load(AgentConfig, "agent", given.config, os.environ)
    logging_setup.configure("warning", json=True)
    allow_files(given.count, len(targets(config.policyd)))
    plan = Plan(given.count, given.first, given.endpoints, given.apps)
    kind = PresetFleet if "TESTS_PRESET" in os.environ else Fleet
    watched = Watched(lambda told: kind(plan, config, SystemClock(), told))
    asyncio.run(serve(watched))


if __name__ == "__main__":
    main()
