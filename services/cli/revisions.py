"""`tessera policy status`, `history`, `rollback`: how far a policy is, and what it was."""

from __future__ import annotations

import getpass
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import DEFAULT_SERVER, Namespace, Output, Server, examples
from services.cli.output import Format, note, say, write_json, write_table

if TYPE_CHECKING:
    from services.cli import views

Kind = Annotated[str, typer.Argument(help="cnp, ccnp, np or clusternp.", metavar="KIND")]
Name = Annotated[str, typer.Argument(metavar="NAME")]
AnyKind = Annotated[str, typer.Argument(help="cnp, ccnp, np or clusternp.", metavar="[KIND]")]
AnyName = Annotated[str, typer.Argument(metavar="[NAME]")]


def status(
    kind: Kind,
    name: Name,
    *,
    namespace: Namespace = "default",
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Tell every change, until Ctrl-C.")
    ] = False,
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """How far a policy is on each node: resolved, sent, realised, or failed and why.

    Ends with 1 while it is not realised everywhere."""
    from services.cli import client, manifests, views

    kind = manifests.kind_named(kind)
    scope = "_" if kind in manifests.CLUSTER_SCOPED else client.segment(namespace)
    path = f"/v1/policies/{kind}/{scope}/{client.segment(name)}/status"
    door = client.server(server)
    if follow:
        for line in door.lines(path + "/events"):
            if line.startswith(b"data: "):
                _follow(line.removeprefix(b"data: "), output)
        return
    body = door.get(path)
    found = views.decode(body, views.PolicyStatus)
    if output is Format.JSON:
        write_json(body)
    else:
        say(found.line())
        if found.nodes:
            head = ("NODE", "STAGE", "REVISION", "IDENTITIES", "REASON")
            write_table(head, [one.row() for one in found.nodes], "")
    if not found.done:
        raise typer.Exit(1)


def _follow(data: bytes, output: Format) -> None:
    from services.cli import views

    if output is Format.JSON:
        say(data.decode())
        return
    found = views.decode(data, views.PolicyStatus)
    late = [node for node in found.nodes if node.stage != "realised"]
    first = f"; {late[0].node}: {late[0].reason}" if late else ""
    more = f" (and {len(late) - 1} more)" if len(late) > 1 else ""
    say(f"{found.line()}{first}{more}")


def history(
    kind: AnyKind = "",
    name: AnyName = "",
    *,
    namespace: Annotated[
        str, typer.Option("-n", "--namespace", help="Only of this one.", metavar="NAME")
    ] = "",
    limit: Annotated[int, typer.Option(help="Newest changes only.", min=1, max=10_000)] = 100,
    diff: Annotated[bool, typer.Option("--diff", help="With what changed, line by line.")] = False,
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """Changes of policies, newest first: revision, time, author."""
    from services.cli import client, manifests, views

    query: dict[str, str | int] = {"limit": limit}
    if kind:
        query["kind"] = manifests.kind_named(kind)
    query |= {key: text for key, text in (("namespace", namespace), ("name", name)) if text}
    body = client.server(server).get("/v1/policies/history", query)
    found = views.decode(body, views.PolicyHistory).changes
    if output is Format.JSON:
        write_json(body)
    elif diff:
        for change in found:
            say("  ".join(change.row()))
            say(change.diff + "\n" if change.diff else "")
    else:
        head = ("REVISION", "TIME", "AUTHOR", "ACTION", "LINES", "POLICY")
        write_table(head, [one.row() for one in found], "no change is recorded")


def rollback(
    revision: Annotated[int, typer.Argument(metavar="REVISION", min=1)],
    kind: AnyKind = "",
    name: AnyName = "",
    *,
    namespace: Namespace = "default",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Until every node has realised it.")] = False,
    timeout: Annotated[str, typer.Option(help="For --wait: 30s, 2m.", metavar="TIME")] = "30s",
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """Make one policy, or all of them, what they were at a revision."""
    from services.cli import client, manifests, views
    from services.cli.apply import Outcome, waited

    door = client.server(server)
    deadline_s = manifests.seconds(timeout)
    query: dict[str, str | int] = {"revision": revision, "author": getpass.getuser()}
    query["dry_run"] = int(dry_run)
    if kind:
        kind = manifests.kind_named(kind)
        query |= {"kind": kind, "name": name}
        query["namespace"] = "" if kind in manifests.CLUSTER_SCOPED else namespace
    done = views.decode(door.request("POST", "/v1/policies/rollback", query), views.Applied)
    outcome = Outcome(done.revision, done.policies)
    if wait and done.policies and not dry_run:
        outcome = waited(door, outcome, deadline_s)
    if output is Format.JSON:
        write_json(outcome.to_json())
    else:
        _tell(outcome.policies, revision, dry_run=dry_run)
        if outcome.realised is not None:
            (say if outcome.realised.done else note)(outcome.realised_line())
    if outcome.failed:
        raise typer.Exit(1)


def _tell(policies: tuple[views.AppliedPolicy, ...], revision: int, *, dry_run: bool) -> None:
    for policy in policies:
        say(f"{policy} {policy.action}{' (dry run)' if dry_run else ''}")
    if not policies:
        note(f"nothing differs from revision {revision}")


EXAMPLES: Mapping[Callable[..., None], str] = {
    status: examples(
        "tessera policy status cnp db -n shop", "tessera policy status cnp db -n shop --follow"
    ),
    history: examples("tessera policy history", "tessera policy history cnp db -n shop --diff"),
    rollback: examples(
        "tessera policy rollback 57 cnp db -n shop --wait", "tessera policy rollback 57 --dry-run"
    ),
}
