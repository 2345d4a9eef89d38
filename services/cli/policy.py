"""`tessera policy`: what may talk to what.

    files ─► one request per file (its name and line numbers stay its own) ─► revision
                                                                  --wait ─► N of N nodes realised

Several files are tried first as a dry run, so that a mistake in the last leaves none applied.
"""

from __future__ import annotations

import getpass
import json
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli import evaluate, paper, questions, revisions
from services.cli.options import DEFAULT_SERVER, Namespace, Output, Server, examples
from services.cli.output import Format, note, say, write_json, write_table

if TYPE_CHECKING:
    from services.cli.apply import Outcome

app = typer.Typer(no_args_is_help=True, help="Network policies.")

Wait = Annotated[bool, typer.Option("--wait", help="Until every node has realised it.")]
Timeout = Annotated[str, typer.Option(help="For --wait: 30s, 2m.", metavar="TIME")]
Files = Annotated[
    list[str],
    typer.Option("-f", "--file", help="File, directory or - ; repeatable.", metavar="PATH"),
]


@app.command(
    epilog=examples(
        "tessera policy apply --wait -f policies/", "tessera policy apply --dry-run -f - <db.yaml"
    )
)
def apply(
    file: Files,
    *,
    namespace: Namespace = "default",
    wait: Wait = False,
    timeout: Timeout = "30s",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge, store nothing.")] = False,
    author: Annotated[str, typer.Option(help="Recorded with the change.", metavar="NAME")] = "",
    confirm: Annotated[
        str,
        typer.Option(
            help="Take it back after this time unless `tessera policy confirm` is run: 60s, 5m.",
            metavar="TIME",
        ),
    ] = "",
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """Apply policies: all of them, or none if one is refused."""
    from services.cli import client, manifests
    from services.cli.apply import Request, apply_all
    from services.cli.confirm import unconfirmed
    from services.runtime import tracing

    deadline_s = manifests.seconds(timeout)
    doubted = None
    if confirm and not dry_run:
        doubted = unconfirmed(server, manifests.seconds(confirm))
    request = Request(manifests.read(file), namespace, author or getpass.getuser(), dry_run=dry_run)
    tracing.configure("cli", "")
    with tracing.span("tessera policy apply"):
        outcome = apply_all(
            client.server(server), request, tracing.current_traceparent(), wait * deadline_s
        )
    if doubted is not None:
        doubted.expect(outcome, request.author)
    if output is Format.JSON:
        write_json(outcome.to_json())
    else:
        _tell(outcome, dry_run=dry_run)
    if outcome.failed:
        raise typer.Exit(1)


@app.command("confirm", epilog=examples("tessera policy confirm", "tessera policy confirm 57"))
def confirm_(
    revision: Annotated[
        int, typer.Argument(metavar="[REVISION]", help="0: all that wait here.", min=0)
    ] = 0,
) -> None:
    """Keep what was applied with --confirm."""
    from services.cli import confirm

    for kept in confirm.confirm(revision):
        say(f"revision {kept} stays")


def _tell(outcome: Outcome, *, dry_run: bool) -> None:
    lines = [str(problem) for problem in outcome.problems]
    if outcome.refused and len(lines) == 1:
        lines[0] += "; nothing was applied"
    for line in lines:
        note(line)
    # A refused trial lists what its other files would have done; none of it was done.
    for policy in () if outcome.refused else outcome.policies:
        state = f"  ({policy.state})" if policy.state not in ("", "enforced") else ""
        say(f"{policy} {policy.action}{' (dry run)' if dry_run else ''}{state}")
    if outcome.refused and len(lines) > 1:
        note("tessera: nothing was applied; correct the lines above")
    elif outcome.realised is None and outcome.revision:
        say(f"stored at revision {outcome.revision}; add --wait to wait for the nodes")
    elif outcome.realised is not None:
        (say if outcome.realised.done else note)(outcome.realised_line())


@app.command(epilog=examples("tessera policy get", "tessera policy get cnp db -n shop >db.yaml"))
def get(
    kind: Annotated[str, typer.Argument(help="cnp, ccnp or np.", metavar="[KIND]")] = "",
    name: Annotated[str, typer.Argument(metavar="[NAME]")] = "",
    namespace: Annotated[
        str, typer.Option("-n", "--namespace", help="Only of this one.", metavar="NAME")
    ] = "",
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """List policies, or print the manifest of one."""
    from services.cli import client, manifests, views
    from services.runtime.errors import NotFound

    query: dict[str, str | int] = {"kind": manifests.kind_named(kind)} if kind else {}
    query |= {key: text for key, text in (("namespace", namespace), ("name", name)) if text}
    body = client.server(server).all_of("/v1/policies", "policies", query)
    found = views.decode(body, views.StoredPolicies).policies
    if name and not found:
        where = f" in namespace {namespace}" if namespace else ""
        raise NotFound(f"no policy {name!r}{where}; see `tessera policy get`")
    if output is Format.JSON:
        write_json(body)
    elif name:
        say("\n---\n".join(policy.manifest.rstrip("\n") for policy in found))
    else:
        head = ("KIND", "NAMESPACE", "NAME", "SELECTS", "REVISION", "STATE")
        write_table(head, [one.row() for one in found], "no policy; every direction is open")


@app.command(
    epilog=examples("tessera policy delete cnp db -n shop", "tessera policy delete -f policies/")
)
def delete(
    kind: Annotated[str, typer.Argument(help="cnp, ccnp or np.", metavar="[KIND]")] = "",
    name: Annotated[str, typer.Argument(metavar="[NAME]")] = "",
    file: Annotated[
        list[str] | None,
        typer.Option("-f", "--file", help="Delete what these name; repeatable.", metavar="PATH"),
    ] = None,
    *,
    namespace: Namespace = "default",
    wait: Wait = False,
    timeout: Timeout = "30s",
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """Delete policies by name, or those that files describe."""
    from services.cli import client, manifests, views
    from services.cli.apply import delete_all, delete_one, waited
    from services.runtime.errors import Invalid

    door, author = client.server(server), getpass.getuser()
    deadline_s = manifests.seconds(timeout)
    absent: tuple[views.PolicyName, ...] = ()
    if file and not kind:
        outcome, absent = delete_all(door, manifests.read(file), namespace, author)
    elif kind and name and not file:
        kind = manifests.kind_named(kind)
        where = "" if kind in manifests.CLUSTER_SCOPED else namespace
        outcome = delete_one(door, views.PolicyName(kind, name, where), author)
    else:
        raise Invalid("name a policy (tessera policy delete cnp NAME -n NAMESPACE) or files (-f)")
    if wait and outcome.policies:
        outcome = waited(door, outcome, deadline_s)
    if output is Format.JSON:
        write_json(outcome.to_json())
    else:
        _tell(outcome, dry_run=False)
    for one in absent:
        note(f"{one} was not there")
    if outcome.failed:
        raise typer.Exit(1)


@app.command(epilog=examples("tessera policy validate -f policies/"))
def validate(file: Files, namespace: Namespace = "default", output: Output = Format.TABLE) -> None:
    """Check manifests without a server."""
    from services.cli import manifests
    from services.policy.parse import parse

    parsed = [parse(one.text, one.source, namespace) for one in manifests.read(file)]
    problems = [problem for one in parsed for problem in one.problems]
    policies = [one.policy for each in parsed for one in each.policies]
    refused = any(one.refused for one in parsed)
    if output is Format.JSON:
        report = {
            "valid": not refused,
            "policies": [
                {
                    "kind": one.ref.kind,
                    "namespace": one.ref.namespace,
                    "name": one.ref.name,
                    "state": one.state,
                }
                for one in policies
            ],
            "problems": [
                {
                    "source": one.source,
                    "line": one.line,
                    "column": one.column,
                    "severity": one.severity,
                    "path": one.path,
                    "message": one.message,
                }
                for one in problems
            ],
        }
        write_json(json.dumps(report).encode())
    else:
        for one in problems:
            kind = "" if one.severity == "error" else f"{one.severity}: "
            note(f"{one.source}:{one.line}:{one.column}: {kind}{one.message}")
        for policy in policies:
            state = "" if policy.state == "enforced" else f"  ({policy.state})"
            say(f"{policy.ref} is valid{state}")
    if refused:
        raise typer.Exit(1)


app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.eval_cases)
for _command, _epilog in {**questions.EXAMPLES, **paper.EXAMPLES, **revisions.EXAMPLES}.items():
    app.command(epilog=_epilog)(_command)
