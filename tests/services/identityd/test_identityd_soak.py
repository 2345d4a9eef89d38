"""Three replicas on one etcd, killed and stopped under churn; the recorded history is judged.

TESSERA_SOAK_S: how long the churn lasts, 12 s unless given. TESSERA_SOAK_SEED: of what happens.
"""

import asyncio
import os
import random
import signal

import pytest

from services.runtime.etcd_process import EmbeddedEtcd
from tests.fakes.etcd import HAVE_ETCD, NO_ETCD
from tests.fakes.identity_churn import (
    Journal,
    Node,
    Recorder,
    Replica,
    now_s,
    stubs_of,
    until_it_answers,
)
from tests.fakes.identity_history import ID, leftovers, violations

pytestmark = [pytest.mark.skipif(not HAVE_ETCD, reason=NO_ETCD), pytest.mark.timeout(0)]

CHURN_S = float(os.environ.get("TESSERA_SOAK_S", "12"))
SEED = int(os.environ.get("TESSERA_SOAK_SEED", "1"))
TTL_S, GRACE_S, QUARANTINE_S = 5, 1, 6
SETTINGS = (
    f"session_ttl_s = {TTL_S}\ngc_grace_s = {GRACE_S}\nquarantine_s = {QUARANTINE_S}\n"
    f"pressed_quarantine_s = {QUARANTINE_S}\n"
)
# How late the recorder may be; the machine is shared.
SLACK_S = 1.5
SETS = [f"k8s:app=app{i}" for i in range(60)]
NODES = 12


async def disturb(replicas, recorder, chooser, until_s):
    """One replica at a time, so that there is always somebody to ask."""
    while now_s() < until_s:
        await asyncio.sleep(chooser.uniform(0.5, 1.5))
        replica = chooser.choice(replicas)
        match chooser.randrange(4):
            case 0 | 1:
                await replica.kill()
                await recorder.compact()
                await replica.start()
            case 2:
                # Beyond the lease of its guard of tombstones, the sessions and the view.
                replica.signal(signal.SIGSTOP)
                await asyncio.sleep(TTL_S + chooser.uniform(0.5, 2.0))
                await recorder.compact()
                replica.signal(signal.SIGCONT)
            case _:
                replica.signal(signal.SIGSTOP)
                await asyncio.sleep(0.3)
                replica.signal(signal.SIGCONT)


async def until_nothing_is_left(recorder):
    """Collecting rests for a session's life after the last start."""
    async with asyncio.timeout(180):
        while True:
            await recorder.caught_up()
            last = {event.key: event.value for event in recorder.events}
            if not any(value for key, value in last.items() if key.startswith(ID)):
                return
            await asyncio.sleep(0.2)


async def test_killed_and_stopped_replicas_break_no_promise(tmp_path):
    chooser = random.Random(SEED)
    journal = Journal()
    async with EmbeddedEtcd(tmp_path / "etcd") as server:
        recorder = Recorder(server.endpoint)
        replicas = [Replica(tmp_path, f"r{i}", server.endpoint, SETTINGS) for i in range(3)]
        async with asyncio.TaskGroup() as tasks:
            recording = tasks.create_task(recorder.run())
            try:
                for replica in replicas:
                    await replica.start()
                async with stubs_of(replicas) as stubs:
                    await churn(replicas, recorder, stubs, journal, chooser)
            finally:
                for replica in replicas:
                    replica.signal(signal.SIGCONT)
                    await replica.kill()
                recording.cancel()
        await recorder.close()
    judged(recorder, journal, replicas)


async def churn(replicas, recorder, stubs, journal, chooser):
    nodes = [
        Node(f"node-{i}", stubs, journal, random.Random(SEED + i), SETS, TTL_S)
        for i in range(NODES)
    ]
    for stub in stubs:
        await until_it_answers(stub)
    # Collecting begins a session's life after the start.
    until_s = now_s() + TTL_S + CHURN_S
    async with asyncio.TaskGroup() as tasks:
        for node in nodes:
            tasks.create_task(node.live(until_s))
        tasks.create_task(disturb(replicas, recorder, chooser, until_s))
    for node in nodes:
        await node.leave()
    await until_nothing_is_left(recorder)


def judged(recorder, journal, replicas):
    logs = "\n".join(replica.log[-2000:] for replica in replicas)
    assert not recorder.failed
    found = violations(recorder.events, journal.answers, quarantine_s=QUARANTINE_S, slack_s=SLACK_S)
    assert not found, (found[:10], logs)
    assert leftovers(recorder.events) == []
    # Something did happen.
    collected = sum(e.value is None for e in recorder.events if e.key.startswith(ID))
    assert len(journal.answers) > 50
    assert collected > 20
    print(
        f"{len(recorder.events)} events, {len(journal.answers)} answers relied on, {collected}"
        f" identities collected, {journal.remapped} remapped, {journal.lost_leases} leases lost,"
        f" {journal.away} calls without an answer"
    )
