"""`tessera identity`: who the numbers are."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.options import DEFAULT_SERVER, Output, Server, examples
from services.cli.output import Format, write_json, write_table

app = typer.Typer(no_args_is_help=True, help="Security identities: label sets and their numbers.")

_HEAD = ("ID", "SCOPE", "NODES", "LABELS")


@app.command("list", epilog=examples("tessera identity list -l 'app=web,tier in (a,b)'"))
def list_(
    labels: Annotated[
        str,
        typer.Option(
            "-l", "--labels", help="Only identities this selector chooses.", metavar="SELECTOR"
        ),
    ] = "",
    limit: Annotated[int, typer.Option(help="At most this many; 0: all.", min=0, metavar="N")] = 0,
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """List identities."""
    from services.cli import client, views

    query: dict[str, str | int] = {}
    if labels:
        query["labels"] = labels
    body = client.server(server).all_of("/v1/identities", "identities", query, limit)
    if output is Format.JSON:
        write_json(body)
        return
    found = views.decode(body, views.Identities)
    empty = "no identity is in use; an endpoint brings one: tessera endpoint add"
    write_table(_HEAD, [one.row() for one in found.identities], empty)


@app.command(epilog=examples("tessera identity get 16423"))
def get(
    id_: Annotated[int, typer.Argument(metavar="ID")],
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """Show one identity."""
    from services.cli import client, views

    body = client.server(server).get(f"/v1/identities/{id_}")
    if output is Format.JSON:
        write_json(body)
        return
    write_table(_HEAD, [views.decode(body, views.Identity).row()], "")
