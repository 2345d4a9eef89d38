"""`tessera identity rules`: which labels make an identity."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import DEFAULT_SERVER, Output, Server, examples
from services.cli.output import Format, note, write_json, write_table

if TYPE_CHECKING:
    from services.cli.views import LabelRules

app = typer.Typer(no_args_is_help=True, help="Which labels make an identity.")

_PATH = "/v1/identities/rules"
_FIELDS = ("label_filter", "policy_relevant", "namespace_quota", "warn_values")


@app.command(epilog=examples("tessera identity rules get", "tessera identity rules get -o json"))
def get(server: Server = DEFAULT_SERVER, output: Output = Format.TABLE) -> None:
    """Show the rules in force."""
    from services.cli import client, views

    body = client.server(server).get(_PATH)
    if output is Format.JSON:
        write_json(body)
        return
    _tell(views.decode(body, views.LabelRules))


@app.command(
    "set",
    epilog=examples(
        "tessera identity rules set --filter '!k8s:pod-uid' --filter '!k8s:build'",
        "tessera identity rules set --policy-relevant",
        "tessera identity rules set --no-filter --namespace-quota 1000",
    ),
)
def set_(
    *,
    filter_: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            help='"!k8s:uid" ignores labels that begin with it, "k8s:app" allows them (then only'
            " what is allowed counts); repeatable, and together the whole filter.",
            metavar="RULE",
        ),
    ] = None,
    no_filter: Annotated[
        bool, typer.Option("--no-filter", help="The default filter alone.")
    ] = False,
    policy_relevant: Annotated[
        bool | None,
        typer.Option(
            "--policy-relevant/--all-labels", help="Only labels that some policy selects by."
        ),
    ] = None,
    namespace_quota: Annotated[
        int | None,
        typer.Option(help="Identities of one namespace; 0: no bound.", min=0, metavar="N"),
    ] = None,
    warn_values: Annotated[
        int | None,
        typer.Option(
            help="So many values of a key in a namespace are warned of.", min=2, metavar="N"
        ),
    ] = None,
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """Change the rules; what is not named stays as it is.

    Running endpoints move to their new identities without losing a packet.
    """
    from services.cli import client, views
    from services.runtime.errors import Invalid

    named = {
        "label_filter": [] if no_filter else filter_,
        "policy_relevant": policy_relevant,
        "namespace_quota": namespace_quota,
        "warn_values": warn_values,
    }
    changes = {key: value for key, value in named.items() if value is not None}
    if not changes or (no_filter and filter_):
        raise Invalid("say what to change; see tessera identity rules set --help")
    door = client.server(server)
    now = json.loads(door.get(_PATH))
    wanted = {key: now[key] for key in _FIELDS} | changes
    # The rules that were read must still be those in force.
    headers = {"content-type": "application/json", "if-match": f'"{now["revision"]}"'}
    body = door.request("PUT", _PATH, body=json.dumps(wanted).encode(), headers=headers)
    if output is Format.JSON:
        write_json(body)
        return
    _tell(views.decode(body, views.LabelRules))
    note("nodes move their endpoints now; see tessera identity watch")


def _tell(rules: LabelRules) -> None:
    write_table(("LABEL RULES", rules.origin), rules.lines(), "")
