"""`tessera status`: one look at the control plane and at this node's agent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import typer

from services.cli.options import (
    DEFAULT_AGENT_SOCKET,
    DEFAULT_SERVER,
    AgentSocket,
    Output,
    Server,
)
from services.cli.output import Format, note, say, write_json, write_table
from services.runtime.errors import TesseraError

if TYPE_CHECKING:
    from services.cli.client import Client


def status(
    server: Server = DEFAULT_SERVER,
    agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET,
    output: Output = Format.TABLE,
) -> None:
    """Show how the control plane and this node are.

    Exits with 1 when a service or the agent does not answer.
    """
    from services.cli import client

    report, failures = {}, []
    doors = {"control_plane": client.server(server), "agent": client.agent(agent_socket)}
    for part, door in doors.items():
        report[part], failure = _ask(door)
        failures += [failure] if failure else []
    failures += ailing(report["control_plane"])
    if report["control_plane"] is not None and (pools := _pools(doors["control_plane"])):
        report["addresses"] = {"pools": pools}
    if output is Format.JSON:
        write_json(json.dumps(report).encode())
    else:
        for part, answer in report.items():
            _tell(part.replace("_", " "), answer)
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


def _pools(door: Client) -> list[dict[str, object]]:
    """How full each pool is. What keeps it from being known is told by the services' own lines."""
    from services.cli import ipam_views, views

    try:
        found = views.decode(door.get("/v1/ipam/pools"), ipam_views.Pools)
    except TesseraError:
        return []
    return [
        {
            "pool": pool.name,
            "family": f"IPv{usage.family}",
            "used": usage.used,
            "capacity": usage.capacity,
            "forecast": usage.forecast(),
        }
        for pool in found.pools
        for usage in pool.usage
    ]


def ailing(control_plane: object) -> Iterator[str]:
    """A line for each service that apid cannot speak to."""
    services = control_plane.get("services") if isinstance(control_plane, dict) else None
    for name, state in services.items() if isinstance(services, dict) else ():
        if state != "ok":
            yield f"{name} is not well: {state}"


def _tell(part: str, answer: object) -> None:
    """Plain values in one table, each list of objects in one of its own."""
    if not isinstance(answer, dict):
        return
    lists = {key: value for key, value in answer.items() if _is_table(value)}
    plain = {key: value for key, value in answer.items() if key not in lists}
    write_table((part.upper(), ""), list(lines(plain)), "")
    for key, rows in lists.items():
        say("")
        head = tuple(rows[0])
        cells = [tuple(_text(row.get(name)) for name in head) for row in rows]
        write_table(tuple(name.upper() for name in (key.removesuffix("s"), *head[1:])), cells, "")
    say("")


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def lines(value: Mapping[str, object], path: str = "") -> Iterator[tuple[str, str]]:
    """A JSON object as (dotted path, text), one leaf each; a list is one leaf."""
    for key, inner in value.items():
        where = f"{path}.{key}" if path else str(key)
        if isinstance(inner, dict) and inner:
            yield from lines(inner, where)
        else:
            yield where, _text(inner)


def _text(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(map(str, value)) or "-"
        case None | "" | {}:
            return "-"
        case _:
            return str(value)
