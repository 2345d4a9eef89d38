"""`tessera identityd` and its like: the named process takes this one's place."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from services.cli.layout import MODULES, child_environ
from services.cli.options import ConfigFile

AGENT_CLEANUP = "datapath.agent.cleanup"


def replace_by(process: str, config: ConfigFile) -> NoReturn:
    _replace(MODULES[process], config)


def _replace(module: str, config: ConfigFile) -> NoReturn:
    argv = [sys.executable, "-m", module]
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


def agent(
    config: ConfigFile = None,
    *,
    cleanup: Annotated[
        bool,
        typer.Option(
            "--cleanup", help="Take interfaces, programs, maps and files of a stopped agent away."
        ),
    ] = False,
) -> None:
    """Run the node agent (root)."""
    if cleanup:
        _replace(AGENT_CLEANUP, config)
    replace_by("agent", config)
