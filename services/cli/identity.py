"""`tessera identity`: who the numbers are, who uses them, and how many are left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from services.cli import label_rules
from services.cli.options import DEFAULT_SERVER, Output, Server, examples
from services.cli.output import Format, note, say, write_json, write_table

if TYPE_CHECKING:
    from services.cli.client import Event

app = typer.Typer(no_args_is_help=True, help="Security identities: label sets and their numbers.")
app.add_typer(label_rules.app, name="rules")

_HEAD = ("ID", "NAMESPACE", "NODES", "ADDRESSES", "LABELS")

Id = Annotated[int, typer.Argument(help="An identity's number.", metavar="ID", min=0)]
Selector = Annotated[
    str,
    typer.Option(
        "-l",
        "--labels",
        help="Only identities this selector chooses: app=web, tier in (a,b), !canary, joined by"
        " commas.",
        metavar="SELECTOR",
    ),
]
Namespace = Annotated[
    str, typer.Option("-n", "--namespace", help="Only of this namespace.", metavar="NAME")
]


@app.command(
    "list",
    epilog=examples(
        "tessera identity list -n shop",
        "tessera identity list -l 'app=web,tier in (front,back)'",
        "tessera identity list -l '!app' -o json",
    ),
)
def list_(
    labels: Selector = "",
    namespace: Namespace = "",
    limit: Annotated[int, typer.Option(help="At most this many; 0: all.", min=0, metavar="N")] = 0,
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """List identities, all of one moment."""
    from services.cli import client, views

    query = {"labels": selected(labels, namespace)}
    body = client.server(server).all_of("/v1/identities", "identities", query, limit)
    if output is Format.JSON:
        write_json(body)
        return
    found = views.decode(body, views.Identities)
    empty = "no identity is in use; an endpoint brings one: tessera endpoint add"
    if labels or namespace:
        empty = "no identity is chosen by that; see them all with: tessera identity list"
    write_table(_HEAD, [one.row() for one in found.identities], empty)


@app.command(epilog=examples("tessera identity get 16423", "tessera identity get 16423 -o json"))
def get(id_: Id, server: Server = DEFAULT_SERVER, output: Output = Format.TABLE) -> None:
    """Show one identity."""
    from services.cli import client, views

    body = client.server(server).get(f"/v1/identities/{id_}")
    if output is Format.JSON:
        write_json(body)
        return
    write_table(("IDENTITY", str(id_)), views.decode(body, views.Identity).lines(), "")


@app.command(
    epilog=examples(
        "tessera identity references 16423", "tessera identity references 16423 -o json"
    )
)
def references(id_: Id, server: Server = DEFAULT_SERVER, output: Output = Format.TABLE) -> None:
    """Show which nodes use an identity, and for which endpoints."""
    from services.cli import client, views

    body = client.server(server).get(f"/v1/identities/{id_}/references")
    if output is Format.JSON:
        write_json(body)
        return
    rows = [row for one in views.decode(body, views.References).references for row in one.rows()]
    empty = f"no node uses identity {id_}; it is collected once that has lasted a while"
    write_table(("NODE", "HOLDS", "ENDPOINT", "ADDRESS"), rows, empty)


@app.command(epilog=examples("tessera identity stats", "tessera identity stats -o json"))
def stats(server: Server = DEFAULT_SERVER, output: Output = Format.TABLE) -> None:
    """Show how many numbers are left, and for how long."""
    from services.cli import client, views

    body = client.server(server).get("/v1/identities/stats")
    if output is Format.JSON:
        write_json(body)
        return
    found = views.decode(body, views.IdentityStats)
    write_table(("IDENTITIES", found.cluster), found.lines(), "")
    if found.pressure != "none":
        note(
            f"{found.taken:.0%} of the numbers are taken; see which labels take them:"
            " tessera identity usage"
        )


@app.command(
    epilog=examples(
        "tessera identity usage",
        "tessera identity usage -n shop",
        "tessera identity usage --key pod-uid",
    )
)
def usage(
    namespace: Namespace = "",
    key: Annotated[str, typer.Option(help="The values of this label key.", metavar="KEY")] = "",
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """Show which label keys and namespaces the numbers go to.

    A key with as many values as identities gives every workload an identity of its own.
    """
    from services.cli import client, views

    query = {name: text for name, text in (("namespace", namespace), ("key", key)) if text}
    body = client.server(server).all_of("/v1/identities/usage", "keys", query)
    if output is Format.JSON:
        write_json(body)
        return
    found = views.decode(body, views.IdentityUsage)
    empty = f"no identity carries the key {key!r}" if key else "no identity is in use"
    if key:
        rows = [value.row() for one in found.keys for value in one.commonest]
        write_table(("VALUE", "IDENTITIES"), rows, empty)
        return
    write_table(("KEY", "VALUES", "IDENTITIES", "COMMONEST"), [k.row() for k in found.keys], empty)
    if found.namespaces and not namespace:
        say("")
        write_table(("NAMESPACE", "IDENTITIES"), [one.row() for one in found.namespaces], "")


@app.command(
    epilog=examples(
        "tessera identity watch -l app=web",
        "tessera identity watch --references",
        "tessera identity watch --since 5120 -o json",
    )
)
def watch(
    labels: Selector = "",
    namespace: Namespace = "",
    *,
    references: Annotated[
        bool, typer.Option("--references", help="Also which nodes take and give back references.")
    ] = False,
    since: Annotated[
        int,
        typer.Option(
            help="Changes after this revision; 0: the list first.", min=0, metavar="REVISION"
        ),
    ] = 0,
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """List identities and go on with their changes, until interrupted.

    A broken connection is taken up where it broke. With `-o json`: one event per line.
    """
    from services.cli import client

    query: dict[str, str | int] = {"labels": selected(labels, namespace), "since": since}
    if references:
        query["references"] = 1
    for event in client.server(server).events("/v1/identities/watch", query):
        if output is Format.JSON:
            say(event.to_json())
        else:
            _tell(event)


def _tell(event: Event) -> None:
    from services.cli import views

    match event.name:
        case "synced":
            note(f"that is all at revision {event.id}; changes follow")
        case "reset":
            note("changes were missed; the whole list follows")
        case "problem":
            note(views.decode(event.data, views.Said).detail)
        case "listed" | "created" | "deleted" | "referenced" | "released":
            say(views.decode(event.data, views.IdentityChange).line(event.name))


def selected(labels: str, namespace: str) -> str:
    of_namespace = f"k8s:io.kubernetes.pod.namespace={namespace}" if namespace else ""
    return ",".join(part for part in (of_namespace, labels) if part)
