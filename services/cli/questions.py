"""`tessera policy explain` and `diff`: why a connection passes or not, and what a change would do.

no -f, --old: apid, over what is in force ----+
files and --endpoints: a Stage, no server ----+--> one form of answer --> lines, or JSON
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from services.cli.options import (
    DEFAULT_AGENT_SOCKET,
    DEFAULT_SERVER,
    AgentSocket,
    Namespace,
    Output,
    Server,
    examples,
)
from services.cli.output import Format, note, say, write_json

if TYPE_CHECKING:
    from services.cli.manifests import Manifest
    from services.flows.flow import Party
    from services.policy.clauses import PolicyRef, RuleSource
    from services.policy.diff import Change as Changed
    from services.policy.explain import Reason
    from services.policy.stage import Stage

DEFAULT_FLOWS = 1000
_WORLD = "world"


class Rule(msgspec.Struct, frozen=True):
    kind: str
    namespace: str
    name: str
    rule: int
    clause: str
    line: int
    log: str = ""

    def __str__(self) -> str:
        where = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{self.kind} {where} rule {self.rule} {self.clause} line {self.line}"


class Miss(msgspec.Struct, frozen=True):
    lacks: str
    rule: Rule


class End(msgspec.Struct, frozen=True):
    direction: str
    verdict: str
    reason: str
    misses: tuple[Miss, ...] = ()


class Explained(msgspec.Struct, frozen=True):
    source: str
    target: str
    port: str
    verdict: str
    ends: tuple[End, ...]


class Change(msgspec.Struct, frozen=True):
    source: str
    target: str
    port: str
    before: str
    after: str
    reason: str = ""


class Problem(msgspec.Struct, frozen=True):
    severity: str
    message: str
    source: str = ""
    line: int = 0
    column: int = 0


class Difference(msgspec.Struct, frozen=True):
    denied: tuple[Change, ...]
    allowed: tuple[Change, ...]
    changed: tuple[Change, ...]
    denied_count: int
    allowed_count: int
    changed_count: int
    unchanged: int
    problems: tuple[Problem, ...] = ()

    @property
    def asked(self) -> int:
        return self.denied_count + self.allowed_count + self.changed_count + self.unchanged


# ------------------------------------------------------------------ explain


def explain(
    source: Annotated[
        str,
        typer.Argument(
            help="namespace/name, world, host, an address; of a server also an identity.",
            metavar="FROM",
        ),
    ],
    target: Annotated[str, typer.Argument(help="The same.", metavar="TO")],
    port: Annotated[str, typer.Argument(help="8080/TCP, 53/UDP or 8/ICMP.", metavar="PORT")],
    *,
    file: Annotated[
        list[str] | None,
        typer.Option(
            "-f", "--file", help="These policies, not those in force; repeatable.", metavar="PATH"
        ),
    ] = None,
    endpoints: Annotated[
        str,
        typer.Option("--endpoints", help="With -f: endpoints and namespaces.", metavar="FILE"),
    ] = "",
    request: Annotated[
        str,
        typer.Option(help="With -f: also a request, as GET /path or dns NAME.", metavar="TEXT"),
    ] = "",
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """Say why a connection passes or not.

    Both ends, the clause that decided, and the nearest miss; by the policies in force, or with -f
    and --endpoints by those of files.
    """
    from services.cli import client, views
    from services.cli.paper import stage_of
    from services.runtime.errors import Invalid

    if _on_paper(file or [], endpoints, "-f"):
        stage = stage_of(file or [], endpoints)
        body = _explained(stage, (source, target, port), request)
    elif request:
        raise Invalid("--request needs -f and --endpoints; no node judges requests yet")
    else:
        query = {"source": source, "target": target, "port": port}
        body = client.server(server).get("/v1/policies/explain", query)
    if output is Format.JSON:
        write_json(body)
        return
    found = views.decode(body, Explained)
    say(f"{found.source} -> {found.target} {found.port}: {found.verdict}")
    for end in found.ends:
        who = found.target if end.direction == "ingress" else found.source
        say(f"  {end.direction} of {who}: {end.reason}")
        for miss in end.misses:
            say(f"    nearly: {miss.lacks} ({miss.rule})")


def _on_paper(files: list[str], endpoints: str, option: str) -> bool:
    from services.runtime.errors import Invalid

    if bool(files) != bool(endpoints):
        raise Invalid(f"{option} and --endpoints go together; without both the server is asked")
    return bool(files)


def _explained(stage: Stage, connection: tuple[str, str, str], request: str) -> bytes:
    from services.policy.evaluate import word_of
    from services.policy.questions import Ports, together
    from services.policy.requests import Request

    source, target, port = connection
    asked = Request.parse(request) if request else None
    reasons = stage.questions.explain(source, target, Ports.parse(port), asked)
    body = {
        "source": source,
        "target": target,
        "port": str(Ports.parse(port)),
        "verdict": together(
            ["deny" if r.request_passes is False else word_of(r.answer) for r in reasons]
        ),
        "ends": list(map(_end, reasons)),
    }
    return json.dumps(body).encode()


def _end(reason: Reason) -> dict[str, object]:
    from services.policy.evaluate import word_of

    return {
        "direction": reason.asked.direction.name.lower(),
        "verdict": word_of(reason.answer),
        "reason": reason.words,
        "rules": list(map(_rule, reason.deciders)),
        "policies": list(map(_ref, reason.policies)),
        "misses": [
            {"lacks": miss.lacks, "rule": _rule(miss.source)}
            for miss in reason.misses
            if miss.source is not None
        ],
    }


def _rule(source: RuleSource) -> dict[str, object]:
    place = {"rule": source.rule_index, "clause": source.clause, "line": source.line}
    return _ref(source.policy) | place | {"log": source.log}


def _ref(ref: PolicyRef) -> dict[str, object]:
    return {"kind": ref.kind, "namespace": ref.namespace, "name": ref.name}


# ------------------------------------------------------------------ diff


def diff(
    *,
    file: Annotated[
        list[str] | None,
        typer.Option(
            "-f", "--file", help="Candidates: what would be applied; repeatable.", metavar="PATH"
        ),
    ] = None,
    delete: Annotated[
        list[str] | None,
        typer.Option(
            help="What would be deleted, as cnp/shop/db or ccnp/all.", metavar="KIND/[NS/]NAME"
        ),
    ] = None,
    port: Annotated[
        list[str] | None,
        typer.Option(
            "--port", help="Ask about all pairs: 8080/TCP, 53/UDP; repeatable.", metavar="PORT"
        ),
    ] = None,
    flows: Annotated[
        int | None,
        typer.Option(
            help=f"Ask about this node's last flows; {DEFAULT_FLOWS} without --port.", min=1
        ),
    ] = None,
    old: Annotated[
        list[str] | None,
        typer.Option("--old", help="Without a server: policies before.", metavar="PATH"),
    ] = None,
    new: Annotated[
        list[str] | None,
        typer.Option("--new", help="Without a server: policies after.", metavar="PATH"),
    ] = None,
    endpoints: Annotated[
        str,
        typer.Option("--endpoints", help="With --old, --new: who there is.", metavar="FILE"),
    ] = "",
    namespace: Namespace = "default",
    server: Server = DEFAULT_SERVER,
    agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET,
    output: Output = Format.TABLE,
) -> None:
    """Show what a change of policies denies or allows.

    Candidates (-f, --delete) against what is in force, over the flows that this node saw or over
    all pairs of identities at some ports; or files against files.
    """
    from services.cli import client, manifests, views
    from services.runtime.errors import Invalid

    if _on_paper([*(old or ()), *(new or ())], endpoints, "--old, --new"):
        body = _differing(old or [], new or [], endpoints, port or [])
    else:
        if not file and not delete:
            raise Invalid("name candidates (-f) or what would be deleted (--delete)")
        asked: dict[str, object] = {
            "manifests": [_text(one) for one in manifests.read(file or ())],
            "deleted": [_named(text) for text in delete or ()],
            "ports": port or [],
            "namespace": namespace,
        }
        if flows or not port:
            asked["connections"] = _seen(agent_socket, flows or DEFAULT_FLOWS)
        headers = {"Content-Type": "application/json"}
        door = client.server(server)
        body = door.request(
            "POST", "/v1/policies/diff", body=json.dumps(asked).encode(), headers=headers
        )
    if output is Format.JSON:
        write_json(body)
    else:
        _tell(views.decode(body, Difference))


def _tell(found: Difference) -> None:
    for problem in found.problems:
        note(f"{problem.source}:{problem.line}:{problem.column}: {problem.message}")
    kinds = (
        ("denied", found.denied, found.denied_count),
        ("allowed", found.allowed, found.allowed_count),
        ("changed", found.changed, found.changed_count),
    )
    for kind, listed, count in kinds:
        for one in listed:
            turn = f"({one.before} -> {one.after})"
            say(f"{kind}  {one.source} -> {one.target} {one.port}  {turn}  {one.reason}")
        if count > len(listed):
            say(f"{kind}  ... and {count - len(listed)} more")
    say(f"{found.unchanged} of {found.asked} connections unchanged")


def _text(manifest: Manifest) -> dict[str, str]:
    # What is no UTF-8 is no YAML either; the server says where.
    return {"text": manifest.text.decode(errors="replace"), "source": manifest.source}


def _named(text: str) -> dict[str, str]:
    from services.cli import manifests
    from services.runtime.errors import Invalid

    kind, *rest = text.split("/")
    kind = manifests.kind_named(kind)
    wanted = 1 if kind in manifests.CLUSTER_SCOPED else 2
    if len(rest) != wanted or not all(rest):
        form = f"{kind}/NAME" if wanted == 1 else f"{kind}/NAMESPACE/NAME"
        raise Invalid(f"{text!r} names no policy; write it as {form}")
    return {"kind": kind, "namespace": rest[0] if wanted == 2 else "", "name": rest[-1]}


def _seen(agent_socket: str, last: int) -> list[dict[str, str]]:
    """Who connected to whom, each once."""
    from services.cli import client
    from services.flows.flow import decode_line
    from services.runtime.errors import Invalid

    found: dict[tuple[str, str, str], None] = {}
    for line in client.agent(agent_socket).lines("/v1/events", {"last": last}):
        flow = decode_line(line)
        number = flow.icmp_type if flow.proto == "ICMP" else flow.destination.port
        found[_name(flow.source), _name(flow.destination), f"{number}/{flow.proto}"] = None
    if not found:
        raise Invalid("this node has seen no flow yet; ask about all pairs with --port")
    keys = ("source", "target", "port")
    return [dict(zip(keys, one, strict=True)) for one in found]


def _name(party: Party) -> str:
    return f"{party.namespace}/{party.name}" if party.name else party.ip


def _differing(old: list[str], new: list[str], endpoints: str, ports: Sequence[str]) -> bytes:
    from services.cli.paper import stage_of
    from services.policy.diff import Connection, difference
    from services.policy.questions import Ports
    from services.runtime.errors import Invalid

    if not ports:
        raise Invalid("--old and --new need --port: at which ports to compare")
    before, after = stage_of(old, endpoints), stage_of(new, endpoints)
    ends = (*after.endpoints, _WORLD)
    asked = [
        Connection(a, b, at)
        for a, b, at in product(ends, ends, map(Ports.parse, ports))
        if (a, b) != (_WORLD, _WORLD)
    ]
    found = difference(before.questions, after.questions, asked)
    kinds = {"denied": found.denied, "allowed": found.allowed, "changed": found.changed}
    body: dict[str, object] = {"unchanged": found.unchanged}
    for kind, changes in kinds.items():
        body[kind] = list(_changes(changes))
        body[f"{kind}_count"] = len(changes)
    return json.dumps(body).encode()


def _changes(changes: Sequence[Changed]) -> Iterator[dict[str, str]]:
    for change in changes:
        at = change.connection
        yield {
            "source": at.source,
            "target": at.target,
            "port": str(at.ports),
            "before": change.before,
            "after": change.after,
            "reason": change.because,
        }


EXAMPLES: dict[Callable[..., None], str] = {
    explain: examples(
        "tessera policy explain shop/web shop/db 5432/TCP",
        "tessera policy explain world shop/web 80 -f policies/ --endpoints endpoints.yaml",
    ),
    diff: examples(
        "tessera policy diff -f new.yaml",
        "tessera policy diff --delete cnp/shop/db --port 5432/TCP",
        "tessera policy diff --old main/ --new branch/ --endpoints endpoints.yaml --port 5432/TCP",
    ),
}
