"""How old the enforced policy is, across restarts, and what follows."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from datapath.agent import checkpoint
from datapath.agent.checkpoint import VIEW_FILE, Journal
from datapath.agent.keeper import Keeper
from datapath.agent.staleness import REFUSE, REPORT, Staleness
from datapath.agent.subscribe import Subscription
from datapath.agent.view import View
from services.runtime.errors import Retry
from tests.fakes import cluster_keys as keys
from tests.fakes.clock import FakeClock
from tests.fakes.faulty_line import Agent, Fault, History, Line, Replica
from tests.sequences.test_distribution import API, LABELS, put


def test_policy_grows_old_from_the_last_word() -> None:
    clock = FakeClock()
    heard = clock.now_s() - 100
    staleness = Staleness(lambda: heard, clock, after_s=60)
    assert staleness.age_s == 100
    assert staleness.words() == "policy is 100 s old, more than [agent] stale_after_s (60)"
    assert Staleness(clock.now_s, clock, after_s=60).words() == ""
    assert Staleness(lambda: heard, clock, after_s=0).words() == "", "0 is never"
    assert Staleness(lambda: 0.0, clock, after_s=60).words() == "", "nothing was ever heard"


def test_new_endpoints_are_refused_only_where_that_was_asked_for() -> None:
    clock = FakeClock()
    heard = clock.now_s() - 100
    Staleness(lambda: heard, clock, 60, REPORT).admit()
    Staleness(lambda: heard, clock, 600, REFUSE).admit()
    with pytest.raises(Retry, match=r"100 s old.*when_stale = refuse"):
        Staleness(lambda: heard, clock, 60, REFUSE).admit()


async def test_a_refused_endpoint_waits_for_no_policy() -> None:
    def admit() -> None:
        raise Retry("stale")

    agent = Agent(Line(lambda: None), (), ())  # type: ignore[arg-type]  # nobody subscribes
    async with agent.running():
        assert agent.enforcement is not None
        subscription = Subscription(
            [None],  # type: ignore[list-item]  # nobody subscribes
            node="n1",
            enforcement=agent.enforcement,
            clock=FakeClock(),
            jitter=random.Random(1),
            before=lambda: None,
            on_realised=lambda _: None,
            admit=admit,
        )
        with pytest.raises(Retry, match="stale"):
            await subscription.in_force(API, 10.0)


async def test_a_stream_that_ends_leaves_the_time_of_its_last_word() -> None:
    history = History()
    history.add([put(keys.identity(API, LABELS[API]))])
    replica = Replica(history, message_bytes=1 << 20)
    line = Line(lambda: replica)
    line.fault, line.at = Fault.CUT, 1
    agent = Agent(line, (API,), (API,))
    async with agent.running() as subscription:
        await agent.reached(history.revision)
        assert subscription.connected
        assert subscription.heard_s == 1_700_000_000.0


async def test_the_checkpoint_tells_the_next_run_until_when_it_was_true(tmp_path: Path) -> None:
    clock, heard = FakeClock(), [1_600_000_000.0]
    view = View(revision=7)
    keeper = Keeper(tmp_path, Journal, view, clock, lambda: heard[0])
    assert checkpoint.heard_s(tmp_path) == 0
    async with asyncio.TaskGroup() as group:
        running = group.create_task(keeper.run())
        await asyncio.sleep(0)
        heard[0] = 1_650_000_000.0
        running.cancel()
    assert checkpoint.heard_s(tmp_path) == 1_650_000_000.0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "shorter than its header"),
        (b"TSRA" + b"\0" * 40, "format 0"),
        (b"junk" * 20, "does not begin like a checkpoint"),
    ],
)
def test_a_view_that_is_none_is_named_and_set_aside(
    tmp_path: Path, content: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / VIEW_FILE).write_bytes(content)
    assert checkpoint.load_view(tmp_path) is None
    assert checkpoint.heard_s(tmp_path) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["view.corrupt"]
    told = capsys.readouterr().out
    assert words in told
    assert "what is in the kernel stays until policyd is heard" in told


@pytest.mark.parametrize("payload", [b"\x80", b"\x93\x01\x02\x03", b"\xc0", b"\x81\xa1x\x01"])
def test_a_view_of_another_shape_is_set_aside_too(tmp_path: Path, payload: bytes) -> None:
    """Its checksum is right: an agent of another time wrote it."""
    checkpoint.write(tmp_path / VIEW_FILE, payload)
    assert checkpoint.load_view(tmp_path) is None
    checkpoint.write(tmp_path / checkpoint.ENDPOINTS_FILE, payload)
    assert checkpoint.load_journal(tmp_path) is None
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"view.corrupt", "endpoints.corrupt"}


def test_cut_anywhere_a_view_is_never_half_believed(tmp_path: Path) -> None:
    whole = tmp_path / VIEW_FILE
    checkpoint.write(whole, checkpoint.pack_view(View(revision=7, instance="i")))
    content = whole.read_bytes()
    for size in range(len(content)):
        whole.write_bytes(content[:size])
        assert checkpoint.load_view(tmp_path) is None, f"{size} of {len(content)} bytes"
        os.remove(tmp_path / "view.corrupt")
