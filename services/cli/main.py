"""The `tessera` command. Commands import what they need when they run: `tessera version` starts
without an RPC or async stack.
"""

from __future__ import annotations

import sys

import typer
from typer.core import TyperGroup

from services.cli import (
    bpf,
    cni,
    endpoint,
    identity,
    ipam,
    nodes,
    observe,
    policy,
    processes,
    status,
    up,
    whois,
)
from services.cli.demo import command as demo
from services.cli.options import Output, examples
from services.cli.output import Format, note, say, write_json
from services.runtime.errors import TesseraError

# What shells and getopt(3) programs use for a command line that cannot be understood.
USAGE = 2

# As `tessera --help` lists them: what is used daily, then what a node or a cluster is made of.
_ORDER = (
    "up", "status", "policy", "endpoint", "identity", "node", "ipam", "whois", "observe", "demo",
    "bpf", "cni",
)  # fmt: skip


class _Ordered(TyperGroup):
    def list_commands(self, ctx: object) -> list[str]:
        names = list(self.commands)
        first = [name for name in _ORDER if name in names]
        return first + [name for name in names if name not in first]


app = typer.Typer(
    name="tessera",
    cls=_Ordered,
    help="Identity-based network policy with an eBPF datapath.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples("tessera up --demo", "tessera policy apply --wait -f policies/"),
)
app.command(epilog=examples("tessera up", "tessera up --config node.toml --cleanup"))(up.up)
app.command(epilog=examples("tessera status", "tessera status -o json"))(status.status)
app.add_typer(policy.app, name="policy")
app.add_typer(endpoint.app, name="endpoint")
app.add_typer(cni.app, name="cni")
app.add_typer(identity.app, name="identity")
app.add_typer(nodes.app, name="node")
app.add_typer(ipam.app, name="ipam")
app.command(epilog=whois.EXAMPLES)(whois.whois)
app.add_typer(bpf.app, name="bpf")
app.command(
    epilog=examples(
        "tessera observe --follow --verdict dropped", "tessera observe --to shop/db --port 5432"
    )
)(observe.observe)
app.command(epilog=examples("tessera demo", "tessera demo --isolated"))(demo.demo)
for _process in (
    processes.identityd,
    processes.ipamd,
    processes.policyd,
    processes.apid,
    processes.agent,
):
    _line = f"tessera {_process.__name__} --config /etc/tessera/tessera.toml"
    app.command(epilog=examples(_line))(_process)
app.command(
    epilog=examples(
        "tessera simnode --count 1000",
        "tessera simnode --count 1000 --first 1000 --config node.toml",
    )
)(processes.simnode)


@app.command(epilog=examples("tessera version -o json"))
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
        # Not standalone: a usage error is one line of ours, like every other.
        sys.exit(app(standalone_mode=False) or 0)
    except TesseraError as error:
        note(f"tessera: {error}")
        sys.exit(1)
    except typer.Abort:
        sys.exit(1)
    except typer.TyperException as error:
        _tell_misuse(error)
        sys.exit(USAGE)


def _tell_misuse(error: typer.TyperException) -> None:
    words = error.format_message()
    if "\n" in words:  # a group without a command: its help is the message
        note(words)
        return
    context: typer.Context | None = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "tessera"
    note(f"{command}: {words.rstrip('.')}; see {command} --help")


if __name__ == "__main__":
    main()
