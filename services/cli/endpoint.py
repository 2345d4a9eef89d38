"""`tessera endpoint`: the workloads of this node, through its agent."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from services.cli.options import DEFAULT_AGENT_SOCKET, AgentSocket, Output, examples
from services.cli.output import Format, say, write_json, write_table

app = typer.Typer(no_args_is_help=True, help="Endpoints of this node.")

# Allocating an identity and an address and realising the first policy, on a loaded machine.
ADD_DEADLINE_S = 60.0
_HEAD = ("ID", "ENDPOINT", "ADDRESS", "IDENTITY", "STATE", "LABELS")

Ref = Annotated[str, typer.Argument(metavar="NAMESPACE/NAME|ID")]


Labels = Annotated[
    list[str] | None,
    typer.Option(
        "-l", "--label", help="key=value, or source:key=value; repeatable.", metavar="LABEL"
    ),
]


@app.command(
    epilog=examples(
        "tessera endpoint add shop/web --netns web -l app=web -l tier=front",
        "tessera endpoint add shop/db --container db -l app=db",
    )
)
def add(
    ref: Annotated[str, typer.Argument(metavar="NAMESPACE/NAME")],
    *,
    netns: Annotated[
        str | None,
        typer.Option(
            help="Name of an `ip netns`, or the path of a network namespace.", metavar="NETNS"
        ),
    ] = None,
    pid: Annotated[
        int | None, typer.Option(help="A process in the network namespace.", min=1, metavar="PID")
    ] = None,
    container: Annotated[
        str | None,
        typer.Option(
            help="Name or id of a running container (podman, Docker, nerdctl, runc, crun).",
            metavar="NAME",
        ),
    ] = None,
    label: Labels = None,
    interface: Annotated[
        str, typer.Option(help="Its name inside the namespace.", metavar="NAME")
    ] = "eth0",
    adopt: Annotated[
        bool,
        typer.Option("--adopt", help="Take the interface that is there; connections go on."),
    ] = False,
    pool: Annotated[
        str, typer.Option(help="Of addresses; else the namespace's.", metavar="POOL")
    ] = "",
    ip: Annotated[
        list[str] | None,
        typer.Option(help="This address; one of each family.", metavar="ADDRESS"),
    ] = None,
    keep: Annotated[
        int,
        typer.Option(help="Keep its addresses for it so long once deleted.", metavar="SECONDS"),
    ] = 0,
    agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET,
    output: Output = Format.TABLE,
) -> None:
    """Give a network namespace an address, an identity and policy.

    A container's own labels are added under the source `container`.
    """
    from services.cli import client, containers, views
    from services.runtime.errors import Invalid

    namespace, slash, name = ref.partition("/")
    if not slash or not namespace or not name:
        raise Invalid(f"endpoint {ref!r} needs a namespace and a name, such as shop/frontend")
    if sum(one is not None for one in (netns, pid, container)) != 1:
        raise Invalid("name the namespace by one of --netns, --pid and --container")
    labels = _sourced(label)
    if container is not None:
        found = containers.find(container)
        netns, labels = found.netns, [*labels, *found.labels]
    elif pid is not None:
        netns = containers.netns_of(pid, f"process {pid}")
    wanted: dict[str, object] = {
        "namespace": namespace,
        "name": name,
        "labels": labels,
        "netns": netns,
        "interface": interface,
    }
    named = {"adopt": adopt, "pool": pool, "ips": ip, "retain_s": keep}
    wanted |= {key: value for key, value in named.items() if value}
    body = client.agent(agent_socket).request(
        "POST",
        "/v1/endpoints",
        body=json.dumps(wanted).encode(),
        headers={"content-type": "application/json"},
        deadline_s=ADD_DEADLINE_S,
    )
    if output is Format.JSON:
        write_json(body)
        return
    made = views.decode(body, views.NewEndpoint)
    say(f"endpoint {ref} is {made.state}: address {made.ip}, identity {made.identity}")


@app.command("list", epilog=examples("tessera endpoint list"))
def list_(agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET, output: Output = Format.TABLE) -> None:
    """List this node's endpoints."""
    from services.cli import client, views

    body = client.agent(agent_socket).get("/v1/endpoints")
    if output is Format.JSON:
        write_json(body)
        return
    found = views.decode(body, views.Endpoints)
    empty = "no endpoint on this node; make one with: tessera endpoint add"
    write_table(_HEAD, [one.row() for one in found.endpoints], empty)


@app.command(epilog=examples("tessera endpoint get shop/web -o json"))
def get(
    ref: Ref, agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET, output: Output = Format.TABLE
) -> None:
    """Show one endpoint."""
    from services.cli import client, views

    body = client.agent(agent_socket).get(_path(ref))
    if output is Format.JSON:
        write_json(body)
        return
    write_table(_HEAD, [views.decode(body, views.Endpoint).row()], "")


@app.command(epilog=examples("tessera endpoint labels shop/web -l app=web -l tier=back"))
def labels(
    ref: Ref,
    *,
    label: Labels = None,
    agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET,
    output: Output = Format.TABLE,
) -> None:
    """Replace all labels of an endpoint; its open connections stay as long as policy allows them.

    Returns when its new identity is in force on every node.
    """
    from services.cli import client, views
    from services.runtime.errors import Invalid

    if not label:
        raise Invalid("name all labels the endpoint is to have from now on, each with -l")
    body = client.agent(agent_socket).request(
        "PUT",
        f"{_path(ref)}/labels",
        body=json.dumps({"labels": _sourced(label)}).encode(),
        headers={"content-type": "application/json"},
        deadline_s=ADD_DEADLINE_S,
    )
    if output is Format.JSON:
        write_json(body)
        return
    made = views.decode(body, views.Endpoint)
    say(f"endpoint {made.ref} has identity {made.identity}: {', '.join(made.labels)}")


@app.command(epilog=examples("tessera endpoint delete shop/web"))
def delete(
    ref: Ref, agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET, output: Output = Format.TABLE
) -> None:
    """Take an endpoint away: its interface, address and identity reference."""
    from services.cli import client

    door = client.agent(agent_socket)
    body = door.request("DELETE", _path(ref), deadline_s=ADD_DEADLINE_S)
    if output is Format.JSON:
        write_json(body or b"{}")
        return
    say(f"endpoint {ref} deleted")


def _sourced(labels: list[str] | None) -> list[str]:
    return [one if ":" in one.split("=")[0] else f"k8s:{one}" for one in labels or ()]


def _path(ref: str) -> str:
    from services.cli.client import segment

    return f"/v1/endpoints/{'/'.join(map(segment, ref.split('/')))}"
