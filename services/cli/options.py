"""Options that several commands share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.cli.output import Format

DEFAULT_SERVER = "http://127.0.0.1:7400"
DEFAULT_AGENT_SOCKET = "/run/tessera/agent.sock"

Server = Annotated[
    str,
    typer.Option("--server", envvar="TESSERA_SERVER", help="Address of apid.", metavar="URL"),
]
AgentSocket = Annotated[
    str,
    typer.Option(
        "--agent-socket",
        envvar="TESSERA_AGENT_SOCKET",
        help="Socket of the node's agent.",
        metavar="PATH",
    ),
]
Output = Annotated[
    Format,
    typer.Option("-o", "--output", help="For people, or for programs.", metavar="table|json"),
]
Namespace = Annotated[
    str,
    typer.Option("-n", "--namespace", help="For objects that name none.", metavar="NAME"),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML configuration file.", metavar="FILE"),
]


def examples(*commands: str) -> str:
    """The end of a help text. The control character keeps the lines from being joined."""
    return "\n".join(("\b", "For example:", *(f"  {command}" for command in commands)))
