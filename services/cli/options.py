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
    typer.Option("--server", envvar="TESSERA_SERVER", help="apid's address.", metavar="URL"),
]
AgentSocket = Annotated[
    str,
    typer.Option(
        "--agent-socket",
        envvar="TESSERA_AGENT_SOCKET",
        help="The node agent's socket.",
        metavar="PATH",
    ),
]
Output = Annotated[
    Format, typer.Option("-o", "--output", help="table for people, json for programs.")
]
Namespace = Annotated[
    str,
    typer.Option("-n", "--namespace", help="For objects that name none.", metavar="NAME"),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML configuration file.", metavar="FILE"),
]
