"""Several replicas, each call to the store let through in an order that hypothesis chooses, the
watches late by as much as it likes, some answers lost after the transaction happened."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import AsyncExitStack, suppress

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.ipamd import pools
from services.runtime.config import PoolConfig
from services.runtime.errors import Conflict, Exhausted, Retry
from services.store.memory import MemoryStore
from tests.fakes.address_service import Replica, check_store, owner, replica
from tests.fakes.clock import FakeClock
from tests.fakes.gated_store import Gate, GatedStore

# Three addresses in two blocks, for four owners.
TINY = {
    "default": PoolConfig(
        cidrs=("10.0.0.0/29",), block_size=30, reserved=("10.0.0.2/31", "10.0.0.4/32")
    )
}

steps = st.lists(
    st.tuples(
        st.integers(0, 1),  # replica
        st.sampled_from(["allocate", "allocate", "release", "release", "reclaim"]),
        st.integers(0, 3),  # owner; its node follows from it
    ),
    max_size=30,
)


class Ledger:
    """What callers were told. An owner's calls follow each other, as an agent's do."""

    def __init__(self) -> None:
        self.told: dict[str, str] = {}
        self.turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def perform(self, gate: Gate, one: Replica, what: str, n: int) -> None:
        name, node = f"w{n}", "ab"[n % 2]
        await gate.pass_through()
        if what == "reclaim":
            with suppress(Retry):
                await one.reclaimer.once()
            return
        async with self.turns[n]:
            await gate.pass_through()
            try:
                if what == "allocate":
                    address = await one.allocate(name, node)
                    assert self.told.get(name, address) == address
                    assert address not in {a for o, a in self.told.items() if o != name}
                    self.told[name] = address
                else:
                    # From here on the address may be another's, whatever the answer.
                    self.told.pop(name, None)
                    await one.release(name, node)
            except (Exhausted, Retry, Conflict):
                pass


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps, st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(0, 3))
def test_no_interleaving_hands_an_address_out_twice(todo, order, lost) -> None:
    asyncio.run(_play(todo, order, lost))


async def _play(todo, order: list[int], lost: int) -> None:
    clock, gate, ledger = FakeClock(), Gate(), Ledger()
    async with MemoryStore(clock) as memory, AsyncExitStack() as stack:
        await pools.ensure(memory, TINY)
        gated = [GatedStore(memory, gate) for _ in range(2)]
        gate.open = True
        for one in gated:
            one.lose_answers, one.error = lost, Retry("the answer was lost")
        replicas = [
            await stack.enter_async_context(replica(store, clock, seed=n, empty_for_s=0))
            for n, store in enumerate(gated)
        ]
        gate.open = False
        async with asyncio.TaskGroup() as tasks:
            work = [
                tasks.create_task(ledger.perform(gate, replicas[which], what, n))
                for which, what, n in todo
            ]
            await _admit_until_done(work, gate, order)
        held = await check_store(memory)
    for name, address in ledger.told.items():
        assert held[str(owner(name))] == address
    assert set(held.values()) <= {"10.0.0.1", "10.0.0.5", "10.0.0.6"}


async def _admit_until_done(work: list[asyncio.Task[None]], gate: Gate, order: list[int]) -> None:
    turn = 0
    while not all(task.done() for task in work):
        for _ in range(8):
            await asyncio.sleep(0)
        if gate.waiting:
            gate.admit(order[turn % len(order)])
            turn += 1
