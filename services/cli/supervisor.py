"""Child processes of `tessera up`: started, watched, restarted with back-off, stopped together.

    Keeper.run() ──► spawn ──► wait for exit ──► report ──► back-off ──► spawn ...
                       └ its own session: Ctrl-C in the terminal reaches the supervisor alone

A child gets SIGTERM when the supervisor vanishes (PR_SET_PDEATHSIG through setpriv), so that no
half of a node outlives the other. What the agent pinned in bpffs keeps enforcing either way.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.runtime.clock import Clock

# Longer than any service needs to drain its streams; then SIGKILL.
STOP_GRACE_S = 10.0
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
# A child that lived this long had started properly: the next death begins a new series.
SETTLED_S = 60.0


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    argv: tuple[str, ...]
    log_file: Path | None
    """None: the child writes to the supervisor's own stderr."""


def backoff_s(deaths: int) -> float:
    """Pause before the start that follows the n-th death in a row (n >= 1)."""
    return float(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (deaths - 1)))


def module_command(name: str, module: str, config: Path, log_dir: Path | None) -> Command:
    argv = (sys.executable, "-m", module, "--config", str(config))
    return Command(name, (*_parent_death_prefix(), *argv), log_dir and log_dir / f"{name}.log")


def _parent_death_prefix() -> Sequence[str]:
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "TERM") if setpriv else ()


def last_words(log_file: Path | None) -> str:
    """The last line a dead child wrote; an exit line of ours says what is wrong."""
    if log_file is None or not log_file.exists():
        return "its messages are above"
    with log_file.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else f"it wrote nothing to {log_file}"


@dataclass
class Keeper:
    """One child, kept running until `run` is cancelled."""

    command: Command
    clock: Clock
    report: Callable[[str], None]
    environ: Mapping[str, str]
    process: asyncio.subprocess.Process | None = field(default=None, init=False)
    deaths: int = field(default=0, init=False)

    async def run(self) -> None:
        in_a_row = 0
        try:
            while True:
                born_s = self.clock.monotonic_s()
                code = await self._live()
                settled = self.clock.monotonic_s() - born_s >= SETTLED_S
                in_a_row = 1 if settled else in_a_row + 1
                self.deaths += 1
                pause_s = backoff_s(in_a_row)
                # Killed from outside: what it happened to say last is no reason.
                words = f": {last_words(self.command.log_file)}" if code >= 0 else ""
                self.report(
                    f"{self.command.name} {_ending(code)}{words}; restarting in {pause_s:g} s"
                )
                await self.clock.sleep(pause_s)
        finally:
            await self.stop()

    async def _live(self) -> int:
        log = self.command.log_file
        with log.open("ab") if log else os.fdopen(os.dup(2), "wb") as out:
            self.process = await asyncio.create_subprocess_exec(
                *self.command.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=dict(self.environ),
                start_new_session=True,
            )
        return await self.process.wait()

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL after the grace. Does nothing when the child is not running."""
        process = self.process
        if process is None or process.returncode is not None:
            return
        _signal(process, signal.SIGTERM)
        try:
            # Not asyncio.timeout: within a cancelled task, where this runs, that of Python 3.11
            # ends in CancelledError instead of TimeoutError.
            await asyncio.wait_for(process.wait(), STOP_GRACE_S)
        except TimeoutError:
            self.report(f"{self.command.name} ignored SIGTERM for {STOP_GRACE_S:g} s: killing it")
            _signal(process, signal.SIGKILL)
            await process.wait()


def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _ending(code: int) -> str:
    if code >= 0:
        return f"exited with status {code}"
    return f"was ended by {signal.Signals(-code).name}"
