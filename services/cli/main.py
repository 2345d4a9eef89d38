"""The `tessera` command. Commands import what they need when they run: `tessera version` starts
without an RPC or async stack.
"""

from __future__ import annotations

import sys

import typer

from services.cli import endpoint, identity, observe, policy, processes, status, up
from services.cli.demo import command as demo
from services.cli.options import Output
from services.cli.output import Format, note, say, write_json
from services.runtime.errors import TesseraError

app = typer.Typer(
    name="tessera",
    help="Identity-based network policy with an eBPF datapath.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(up.up)
app.command()(status.status)
app.add_typer(policy.app, name="policy")
app.add_typer(endpoint.app, name="endpoint")
app.add_typer(identity.app, name="identity")
app.command()(observe.observe)
app.command()(demo.demo)
for _process in (
    processes.identityd,
    processes.ipamd,
    processes.policyd,
    processes.apid,
    processes.agent,
):
    app.command()(_process)


@app.command()
def version(output: Output = Format.TABLE) -> None:
    """Print the version."""
    import json
    from importlib import metadata

    number = metadata.version("tessera")
    if output is Format.JSON:
        write_json(json.dumps({"version": number}).encode())
    else:
        say(f"tessera {number}")


def main() -> None:
    try:
        app()
    except TesseraError as error:
        note(f"tessera: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
