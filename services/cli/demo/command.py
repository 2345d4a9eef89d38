"""`tessera demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import (
    DEFAULT_AGENT_SOCKET,
    DEFAULT_SERVER,
    AgentSocket,
    Output,
    Server,
)
from services.cli.output import Format, note, write_json

if TYPE_CHECKING:
    from services.cli.demo.run import Report


def demo(
    *,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="On a node of its own, even if one is running.")
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave endpoints and policies on the running node.")
    ] = False,
    server: Server = DEFAULT_SERVER,
    agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET,
    output: Output = Format.TABLE,
) -> None:
    """Run a small application under real policies and show every verdict and its rule."""
    from services.cli.demo import run, table
    from services.cli.foreground import INTERRUPTED, until_signal
    from services.runtime import log
    from services.runtime.errors import Invalid

    log.configure("warning", json=False)
    reports: list[Report] = []

    async def work() -> None:
        doors = None if isolated else run.running_node(server, agent_socket)
        if doors is not None:
            reports.append(await run.on_node(doors, note, keep=keep))
        elif keep:
            raise Invalid("--keep needs a running node to keep things on; start `tessera up` first")
        else:
            reports.append(await run.on_own_node(note))

    if until_signal(work()):
        raise typer.Exit(INTERRUPTED)
    report = reports[0]
    if output is Format.JSON:
        write_json(report.to_json())
    else:
        table.show(report)
    if not report.right:
        raise typer.Exit(1)
