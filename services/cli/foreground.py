"""Commands that stay in the foreground until they are done or a signal ends them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine

from services.cli import node
from services.cli.node import Plan
from services.cli.output import note, say
from services.runtime.clock import SystemClock

# What a shell reports for a command ended by SIGINT.
INTERRUPTED = 130


async def run_node(plan: Plan, *, demo: bool) -> None:
    async with node.running(plan, SystemClock(), say) as running:
        say(
            f"agent socket {running.addresses.agent_socket}, configuration "
            f"{plan.layout.config_file}, logs {'here' if plan.verbose else plan.layout.log_dir}"
        )
        if demo:
            from services.cli.demo import run, table

            table.show(await run.on_node(run.Doors(running.server, running.agent), note))
        say("press Ctrl-C to stop")
        await asyncio.Event().wait()


def until_signal(work: Coroutine[None, None, None]) -> bool:
    """Runs `work`; SIGINT or SIGTERM cancels it once, so that its clean-up is not cut short by a
    second one. True when a signal ended it."""

    async def main() -> bool:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, _cancel_once, task)
        try:
            await work
        except asyncio.CancelledError:
            return True
        return False

    return asyncio.run(main())


def _cancel_once(task: asyncio.Task[object]) -> None:
    if not task.cancelling():
        note("stopping")
        task.cancel()
