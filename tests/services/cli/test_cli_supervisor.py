import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from services.cli import supervisor
from services.cli.supervisor import Command, Keeper, backoff_s, last_words
from services.runtime.clock import SystemClock

SLEEPER = "import time, sys; print('up', flush=True); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEPER
QUITTER = "import sys; print('tessera x: no such thing', file=sys.stderr); sys.exit(1)"


class QuickClock(SystemClock):
    """Real time with short pauses."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0.001)


def keeper(source: str, log_file: Path, said: list[str]) -> Keeper:
    command = Command("x", (sys.executable, "-c", source), log_file)
    return Keeper(command, QuickClock(), said.append, dict(os.environ))


async def until(check) -> None:
    async with asyncio.timeout(30):
        while not check():  # noqa: ASYNC110 - a file and a process table raise no event
            await asyncio.sleep(0.01)


def wrote(log_file: Path, text: str = "up") -> bool:
    return log_file.exists() and text in log_file.read_text()


def test_pauses_double_and_stop_growing():
    assert [backoff_s(n) for n in (1, 2, 3, 4)] == [0.5, 1, 2, 4]
    assert backoff_s(50) == supervisor.BACKOFF_MAX_S


async def test_a_child_that_dies_is_started_again_later_each_time_and_its_words_are_reported(
    tmp_path,
):
    said: list[str] = []
    kept = keeper(QUITTER, tmp_path / "x.log", said)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(kept.run())
        await until(lambda: kept.deaths >= 3)
        task.cancel()
    assert "exited with status 1: tessera x: no such thing; restarting in 0.5 s" in said[0]
    assert kept.clock.pauses[:3] == [0.5, 1.0, 2.0]


async def test_a_child_killed_from_outside_comes_back_as_another_process(tmp_path):
    said: list[str] = []
    kept = keeper(SLEEPER, tmp_path / "x.log", said)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(kept.run())
        await until(lambda: wrote(tmp_path / "x.log"))
        first = kept.process.pid
        os.kill(first, signal.SIGKILL)
        await until(lambda: kept.process.pid != first)
        task.cancel()
    assert "was ended by SIGKILL" in said[0]
    assert kept.process.returncode is not None


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "STOP_GRACE_S", 0.1)
    said: list[str] = []
    kept = keeper(STUBBORN, tmp_path / "x.log", said)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(kept.run())
        await until(lambda: wrote(tmp_path / "x.log"))
        task.cancel()
    assert kept.process.returncode == -signal.SIGKILL
    assert "ignored SIGTERM" in said[0]


async def test_a_child_does_not_outlive_a_supervisor_that_was_killed(tmp_path):
    command = supervisor.module_command("x", "http.server", Path("unused"), tmp_path)
    if command.argv[0] == sys.executable:
        pytest.skip("no setpriv on this machine")
    argv = [*command.argv[:3], sys.executable, "-c", SLEEPER]
    source = (
        "import subprocess, time;"
        f"child = subprocess.Popen({argv!r}, stdout=subprocess.PIPE);"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(600)"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", source, stdout=asyncio.subprocess.PIPE
    )
    child = int(await parent.stdout.readline())
    parent.kill()
    await parent.communicate()
    await until(lambda: not _alive(child))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_last_words_are_the_last_line_said(tmp_path):
    log = tmp_path / "x.log"
    assert last_words(None) == "its messages are above"
    log.write_text("")
    assert "wrote nothing" in last_words(log)
    log.write_text("first\n" * 5000 + "last\n\n")
    assert last_words(log) == "last"
