"""Whatever happens to the stream or to either of its ends, at whichever message: the node ends with
the tables of one that was told everything at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from datapath.maps.layout import Verdict
from datapath.maps.tables import Tables
from services.policy.clauses import Direction
from tests.fakes import cluster_keys as keys
from tests.fakes.agent_sequences import assert_clean
from tests.fakes.faulty_line import Agent, Fault, History, Line, Replica, Step, addresses_in
from tests.fakes.kernel_lookup import judge
from tests.sequences.test_distribution import (
    API,
    DB,
    HISTORIES,
    JOB,
    LABELS,
    WEB,
    content_after,
    gone,
    put,
)

EVERYONE = (WEB, API, DB, JOB)
PROBES = ((6, 80), (6, 81), (6, 443), (17, 53))

# All four exist and each may reach the next; one more address changes hands, one group shrinks.
BUSY: list[Step] = [
    *(put(keys.identity(number, labels)) for number, labels in LABELS.items()),
    put(keys.policy(keys.allow("api", "api", "web"), 16)),
    put(keys.address("10.2.0.1", WEB, "192.0.2.9")),
    put(keys.policy(keys.allow("db", "db", "api"), 30)),
    put(keys.identity(2001, keys.pod("web"))),
    put(keys.address("10.2.0.2", 2001, "192.0.2.9")),
    put(keys.policy(keys.to_cidr("web", "web", "10.0.0.0/8", but="10.1.0.0/16"), 40)),
    put(keys.address("10.2.0.1", API, "192.0.2.9")),
    gone(keys.identity(2001, keys.pod("web"))),
    gone(keys.address("10.2.0.2", 2001)),
    put(keys.policy(keys.allow("api", "api", "db", 81), 50)),
]
STORIES = {**HISTORIES, "a busy day": BUSY}
# Told last, so that what was lost before it shows.
LAST: list[Step] = [put(keys.node("last", "192.0.2.77")), put(keys.address("10.2.9.9", 2999))]


def answers(tables: Tables) -> dict[tuple[object, ...], tuple[Verdict, int]]:
    found = {}
    for _, row in tables.endpoints.items():
        for direction, slot in ((Direction.INGRESS, row.slot_in), (Direction.EGRESS, row.slot_out)):
            for peer in (0, 1, 2, *EVERYONE, 2001):
                for proto, port in PROBES:
                    key = (row.identity, direction, peer, proto, port)
                    found[key] = judge(tables, slot, peer, proto, port)
    return found


def left_in(story: list[Step]) -> tuple[int, ...]:
    """The identities that exist at its end: only their policy is certain to have been seen."""
    content = content_after(story)
    return tuple(n for n in EVERYONE if keys.identity(n, LABELS[n])[0] in content)


Expected = tuple[dict[tuple[object, ...], tuple[Verdict, int]], object]


async def told_at_once(story: list[Step]) -> Expected:
    history = History()
    history.add([*story, *LAST])
    replica = Replica(history, message_bytes=1 << 20)
    agent = Agent(Line(lambda: replica), EVERYONE, left_in(story))
    async with agent.running():
        await agent.reached(history.revision)
    return answers(agent.tables), addresses_in(agent.tables)


async def told(
    story: list[Step],
    fault: Fault,
    at: int,
    expected: Expected,
    *,
    message_bytes: int,
    log_keys: int,
) -> Line:
    """The story step by step, with a fault at one message; the node ends as `expected`."""
    history = History()
    replica = Replica(history, message_bytes=message_bytes, log_keys=log_keys)
    killed, missed = asyncio.Event(), asyncio.Event()

    def struck(what: Fault) -> None:
        nonlocal replica
        if what is Fault.REPLACED:
            replica = Replica(history, message_bytes=message_bytes, log_keys=log_keys)
        elif what is Fault.RESTARTED:
            killed.set()
        missed.set()

    line = Line(lambda: replica)
    line.fault, line.at, line.on_fault = fault, at, struck
    agent = Agent(line, EVERYONE, left_in(story))
    todo = [*([step] for step in story), LAST]
    while todo:
        killed.clear()
        async with agent.running():
            while todo and not killed.is_set():
                missed.clear()
                replica.feed(history.add(todo.pop(0)))
                if len(todo) % 3 or not todo:
                    await reached_or(missed, agent, history.revision)
                if len(todo) == len(story) // 2 and not killed.is_set():
                    agent.save()
                if missed.is_set() and not todo:  # nothing would tell that something is missing
                    todo.append([put(keys.node("late")), gone(keys.node("late"))])
    assert answers(agent.tables) == expected[0]
    assert addresses_in(agent.tables) == expected[1]
    assert agent.enforcement is not None
    assert_clean(agent.enforcement, agent.tables)
    return line


async def reached_or(event: asyncio.Event, agent: Agent, revision: int) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(agent.reached(revision)), group.create_task(event.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()


def struck_everywhere(
    story: list[Step], fault: Fault, *, message_bytes: int, log_keys: int = 200_000
) -> Iterator[Line]:
    at = int(fault is Fault.LOST)  # without a first answer, time has to pass
    expected = asyncio.run(told_at_once(story))
    while True:
        line = asyncio.run(
            told(story, fault, at, expected, message_bytes=message_bytes, log_keys=log_keys)
        )
        if line.fault is not None:
            return  # it has not come to so many messages
        yield line
        at += 1


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name)
@pytest.mark.parametrize("name", STORIES)
def test_a_fault_at_any_message_leaves_no_trace(name: str, fault: Fault) -> None:
    for line in struck_everywhere(STORIES[name], fault, message_bytes=1 << 20):
        assert line.messages > line.at


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name)
def test_a_fault_within_an_update_of_many_messages_leaves_no_trace(fault: Fault) -> None:
    struck = list(struck_everywhere(BUSY, fault, message_bytes=40))
    assert len(struck) > len(BUSY) + 1, "no Update was divided"


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.REPLACED, Fault.LOST], ids=lambda f: f.name)
def test_a_log_that_does_not_reach_back_costs_bytes_alone(fault: Fault) -> None:
    assert list(struck_everywhere(BUSY, fault, message_bytes=1 << 20, log_keys=1))
