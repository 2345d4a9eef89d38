"""Simulated nodes before a control plane of real processes: what they hold is what the store says,
whatever is killed or stopped meanwhile.

At full length: TESSERA_SOAK_NODES=200 TESSERA_SOAK_S=600 TESSERA_SOAK_EVERY_S=10; another seed:
TESSERA_SOAK_SEED.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from tessera_wire.identity.v1 import identity_pb2, identity_pb2_grpc
from tessera_wire.policy.v1 import policy_pb2, policy_pb2_grpc

from services.runtime.config import EtcdConfig
from services.runtime.errors import TesseraError
from services.store.open import open_store
from services.wire.client import call, channel
from tests.fakes import cluster_keys as keys
from tests.fakes.plane import Plane
from tests.fakes.stack import eventually

NODES = int(os.environ.get("TESSERA_SOAK_NODES", "12"))
SOAK_S = float(os.environ.get("TESSERA_SOAK_S", "12"))
EVERY_S = float(os.environ.get("TESSERA_SOAK_EVERY_S", "3"))
SEED = int(os.environ.get("TESSERA_SOAK_SEED", "1"))
APPS = 20
# How long a stopped process stays stopped: past its peers' patience and its lease's half.
STOPPED_S = min(EVERY_S * 0.8, 8.0)
SETTLE_S = 90.0


@pytest.fixture
def plane() -> Iterator[Plane]:
    made = Plane.start("soak", etcds=3, identityds=2, policyds=2)
    try:
        yield made
    finally:
        made.stop()


@dataclass
class Acknowledged:
    """What was answered as done: the newest text of each policy, None for a deleted one; identities
    by their label set. A write that got no answer may have happened or not."""

    policies: dict[str, str | None] = field(default_factory=dict)
    unsure: dict[str, set[str | None]] = field(default_factory=dict)
    identities: dict[str, int] = field(default_factory=dict)
    writes: int = 0
    refused: int = 0


class Writer:
    """Changes policies and identities through whichever replica answers."""

    def __init__(self, plane: Plane, seed: int) -> None:
        self._plane = plane
        self._rng = random.Random(seed)
        self.told = Acknowledged()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._write()
            await asyncio.sleep(0.05)

    async def _write(self) -> None:
        action = self._rng.random()
        try:
            if action < 0.25:
                await self._identity()
            else:
                await self._policy(deleted=action > 0.9)
        except TesseraError:
            self.told.refused += 1
        else:
            self.told.writes += 1

    async def _policy(self, *, deleted: bool) -> None:
        name = f"p{self._rng.randrange(40)}"
        subject, peer = (f"sim-{self._rng.randrange(APPS)}" for _ in range(2))
        port = self._rng.choice([80, 81, 443])
        text = None if deleted else keys.allow(name, subject, peer, port, namespace="sim")
        self.told.unsure.setdefault(name, set()).add(text)
        target = self._plane.target(self._rng.choice(self._plane.all_of("policyd")))
        async with channel(target) as dialled:
            admin = policy_pb2_grpc.PolicyAdminStub(dialled)
            if text is None:
                ref = policy_pb2.PolicyRef(kind="CiliumNetworkPolicy", namespace="sim", name=name)
                await call(admin.Delete, policy_pb2.DeleteRequest(refs=[ref]), deadline_s=5.0)
            else:
                request = policy_pb2.ApplyRequest(manifests=text.encode())
                await call(admin.Apply, request, deadline_s=5.0)
        self.told.policies[name] = text
        self.told.unsure[name] = set()

    async def _identity(self) -> None:
        label = f"k8s:extra=e{self._rng.randrange(10_000)}"
        target = self._plane.target(self._rng.choice(self._plane.all_of("identityd")))
        async with channel(target) as dialled:
            stub = identity_pb2_grpc.IdentityServiceStub(dialled)
            request = identity_pb2.OpenSessionRequest(node="writer", ttl_s=3600)
            session = await call(stub.OpenSession, request, deadline_s=5.0)
            item = identity_pb2.AllocateItem(labels=identity_pb2.LabelSet(labels=[label]))
            request = identity_pb2.AllocateRequest(node="writer", lease=session.lease, items=[item])
            (result,) = (await call(stub.Allocate, request, deadline_s=5.0)).results
        if result.identity:
            self.told.identities[label] = result.identity


class Trouble:
    """Every EVERY_S one process is killed and started again, or stopped for a while."""

    def __init__(self, plane: Plane, seed: int) -> None:
        self._plane = plane
        self._rng = random.Random(seed)
        self.done: list[str] = []

    async def run(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        victims = [*self._plane.all_of("policyd"), *self._plane.all_of("identityd")]
        victims += [*self._plane.all_of("etcd"), "fleet1"]
        while time.perf_counter() < end:
            victim = self._rng.choice(victims)
            kill = victim == "fleet1" or self._rng.random() < 0.5
            self.done.append(f"{'killed' if kill else 'stopped'} {victim}")
            if kill:
                await asyncio.to_thread(self._plane.kill, victim)
                await asyncio.sleep(EVERY_S / 4)
                self._plane.run(victim)
                await asyncio.sleep(EVERY_S * 3 / 4)
            else:
                self._plane.signal(victim, signal.SIGSTOP)
                await asyncio.sleep(STOPPED_S)
                self._plane.signal(victim, signal.SIGCONT)
                await asyncio.sleep(EVERY_S - STOPPED_S)


async def stored(plane: Plane) -> dict[str, str]:
    async with open_store(EtcdConfig(endpoints=tuple(plane.etcd))) as store:
        items = (await store.list("tessera/policy/object/CiliumNetworkPolicy/sim/")).items
    return {kv.key.rpartition("/")[2]: keys.manifest_of(kv.value) for kv in items}


def settled(plane: Plane, count: dict[str, int]) -> Callable[[], bool]:
    def check() -> bool:
        states = {name: plane.fleets[name].ask("state") for name in count}
        return all(
            state["connected"] == state["enforcing"] == state["nodes"] == count[name]
            for name, state in states.items()
        )

    return check


def differing(plane: Plane) -> dict[str, str]:
    found: dict[str, str] = {}
    for fleet in plane.fleets.values():
        answer = fleet.ask("check", ",".join(plane.etcd))
        assert answer["checked"] > 0
        found |= answer["differing"]
    return found


@pytest.mark.timeout(SOAK_S + 4 * SETTLE_S)
def test_whatever_dies_every_node_ends_with_what_the_store_says(plane: Plane) -> None:
    count = {"fleet0": NODES - NODES // 4, "fleet1": NODES // 4}
    plane.fleet("fleet0", count["fleet0"], apps=APPS, endpoints=4)
    plane.fleet("fleet1", count["fleet1"], first=count["fleet0"], apps=APPS, endpoints=4)
    eventually(settled(plane, count), "not all nodes enforce", SETTLE_S)
    writer, trouble = Writer(plane, SEED), Trouble(plane, SEED)

    async def soak() -> None:
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(writer.run())
            await trouble.run(SOAK_S)
            writing.cancel()

    asyncio.run(soak())
    print("\n".join(trouble.done))
    told = writer.told
    print(f"{told.writes} writes acknowledged, {told.refused} not")
    assert told.writes > len(trouble.done), "hardly anything was written"
    eventually(settled(plane, count), "not all nodes came back", SETTLE_S)
    # The nodes follow within moments; what is compared must not move meanwhile.
    eventually(lambda: not differing(plane), f"tables differ: {differing(plane)}", SETTLE_S)

    now = asyncio.run(stored(plane))
    for name, text in told.policies.items():
        allowed = {text, *told.unsure[name]}
        assert now.get(name) in allowed, f"{name} was acknowledged and is not there"
    public = asyncio.run(identities(plane))
    lost = {label: n for label, n in told.identities.items() if label not in public.get(n, "")}
    assert not lost, "identities were acknowledged and are not there"

    spoilt = plane.fleets["fleet0"].ask("spoil")
    assert differing(plane).keys() == {spoilt}, "the comparison does not see a wrong row"


async def identities(plane: Plane) -> dict[int, str]:
    async with open_store(EtcdConfig(endpoints=tuple(plane.etcd))) as store:
        items = (await store.list("cilium/state/identities/v1/id/")).items
    return {int(kv.key.rpartition("/")[2]): kv.value.decode() for kv in items}
