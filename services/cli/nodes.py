"""`tessera node`: how far the nodes are."""

from __future__ import annotations

import typer

from services.cli.options import DEFAULT_SERVER, Output, Server, examples
from services.cli.output import Format, write_json, write_table

app = typer.Typer(no_args_is_help=True, help="The nodes of the cluster.")


@app.command("list", epilog=examples("tessera node list", "tessera node list -o json"))
def list_(server: Server = DEFAULT_SERVER, output: Output = Format.TABLE) -> None:
    """List nodes: connected, and at which revision of policy."""
    from services.cli import client, views

    body = client.server(server).all_of("/v1/nodes", "nodes")
    if output is Format.JSON:
        write_json(body)
        return
    found = views.decode(body, views.Nodes)
    rows = [one.row(found.revision) for one in found.nodes]
    empty = "no node is registered; start its agent: tessera agent"
    write_table(("NODE", "CONNECTED", "REALISED", "BEHIND"), rows, empty)
