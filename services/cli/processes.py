"""`tessera identityd` and its like: the named process takes this one's place."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from typing import Annotated, NoReturn

import typer

from services.cli.layout import MODULES, child_environ
from services.cli.options import ConfigFile
from services.runtime.errors import Invalid

AGENT_CLEANUP = "datapath.agent.cleanup"
SIMNODE = "datapath.simnode.main"


def replace_by(process: str, config: ConfigFile) -> NoReturn:
    _replace(MODULES[process], config)


def _replace(module: str, config: ConfigFile, *arguments: str) -> NoReturn:
    argv = [sys.executable, "-m", module, *arguments]
    if config is not None:
        argv += ["--config", str(config)]
    os.execve(sys.executable, argv, child_environ(os.environ))


def identityd(config: ConfigFile = None) -> None:
    """Run the identity service."""
    replace_by("identityd", config)


def ipamd(config: ConfigFile = None) -> None:
    """Run the address service."""
    replace_by("ipamd", config)


def policyd(config: ConfigFile = None) -> None:
    """Run the policy service."""
    replace_by("policyd", config)


def apid(config: ConfigFile = None) -> None:
    """Run the REST server."""
    replace_by("apid", config)


class AgentTask(StrEnum):
    RUN = "run"
    BREAK_GLASS = "break-glass"


def agent(
    task: Annotated[
        AgentTask,
        typer.Argument(metavar="TASK", help="break-glass: switch the host firewall off at once."),
    ] = AgentTask.RUN,
    *,
    config: ConfigFile = None,
    mend: Annotated[
        bool, typer.Option("--mend", help="With break-glass: switch it on again.")
    ] = False,
    cleanup: Annotated[
        bool,
        typer.Option(
            "--cleanup", help="Take interfaces, programs, maps and files of a stopped agent away."
        ),
    ] = False,
) -> None:
    """Run the node agent (root)."""
    if task is AgentTask.BREAK_GLASS:
        from services.cli.breakglass import break_glass

        break_glass(config, mend=mend)
        return
    if mend:
        raise Invalid("--mend goes with break-glass: tessera agent break-glass --mend")
    if cleanup:
        _replace(AGENT_CLEANUP, config)
    replace_by("agent", config)


def simnode(
    config: ConfigFile = None,
    *,
    count: Annotated[int, typer.Option(help="Nodes in this process.", min=1)] = 100,
    first: Annotated[int, typer.Option(help="Number of the first, for several processes.")] = 0,
    endpoints: Annotated[int, typer.Option(help="Endpoints of each node.", min=0)] = 10,
    apps: Annotated[int, typer.Option(help="Label sets among all endpoints.", min=1)] = 100,
) -> None:
    """Run simulated nodes: the agent's code on tables in memory, to load a control plane.

    Targets are those of [agent]. Neither root nor a kernel is needed."""
    numbers = {"count": count, "first": first, "endpoints": endpoints, "apps": apps}
    pairs = (text for name, number in numbers.items() for text in (f"--{name}", str(number)))
    _replace(SIMNODE, config, *pairs)
