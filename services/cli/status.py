"""`tessera status`: one look at the control plane and at this node's agent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from services.cli.options import (
    DEFAULT_AGENT_SOCKET,
    DEFAULT_SERVER,
    AgentSocket,
    Output,
    Server,
)
from services.cli.output import Format, note, say, write_json
from services.runtime.errors import TesseraError

if TYPE_CHECKING:
    from services.cli.client import Client


def status(
    server: Server = DEFAULT_SERVER,
    agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET,
    output: Output = Format.TABLE,
) -> None:
    """Show the health of the control plane and of this node; exit 1 when one does not answer."""
    from services.cli import client

    report, failures = {}, []
    doors = {"control_plane": client.server(server), "agent": client.agent(agent_socket)}
    for part, door in doors.items():
        report[part], failure = _ask(door)
        failures += [failure] if failure else []
    if output is Format.JSON:
        write_json(json.dumps(report).encode())
    else:
        for part, answer in report.items():
            if answer is not None:
                say(part.replace("_", " "))
                for line in lines(answer):
                    say(f"  {line}")
    for failure in failures:
        note(f"tessera: {failure}")
    if failures:
        raise typer.Exit(1)


def _ask(door: Client) -> tuple[object, str]:
    """(answer, "") or (None, why not)."""
    try:
        return json.loads(door.get("/v1/status")), ""
    except TesseraError as error:
        return None, str(error)


def lines(value: object, path: str = "") -> Iterator[str]:
    """A JSON value as `path  text`, one leaf a line; a list of plain values is one leaf."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from lines(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        for at, inner in enumerate(value):
            yield from lines(inner, f"{path}[{at}]")
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        yield f"{path:<28} {text or '-'}"
