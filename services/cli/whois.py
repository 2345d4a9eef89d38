"""`tessera whois`: who stands behind a number, an address or a name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import DEFAULT_SERVER, Output, Server, examples
from services.cli.output import Format, note, say, write_json, write_table

if TYPE_CHECKING:
    from services.cli import views

EXAMPLES = examples(
    "tessera whois 16423",
    "tessera whois 10.244.0.7",
    "tessera whois shop/db",
    "tessera whois 10.244.0.0/24 -o json",
)


def whois(
    who: Annotated[
        str,
        typer.Argument(
            help="An identity's number, an address, a CIDR, an endpoint (namespace/name, or its"
            " name alone), a node, or a reserved name such as world.",
            metavar="WHO",
        ),
    ],
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """Say who an identity, address, endpoint or node is.

    Also which policies select it. What stands in a log line can be pasted as it is.
    """
    from services.cli import client, views

    body = client.server(server).get("/v1/whois", {"q": who})
    if output is Format.JSON:
        write_json(body)
        return
    _tell(views.decode(body, views.Whois))


def _tell(found: views.Whois) -> None:
    for sentence in found.says:
        say(sentence)
    if found.identities:
        say("")
        head = ("IDENTITY", "NAMESPACE", "NODES", "ADDRESSES", "LABELS")
        write_table(head, [one.row() for one in found.identities], "")
    if found.endpoints:
        say("")
        rows = [(one.ip, one.ref, str(one.identity), one.node or "-") for one in found.endpoints]
        write_table(("ADDRESS", "ENDPOINT", "IDENTITY", "NODE"), rows, "")
    if found.more:
        note("there are more addresses than are shown")
    if found.policies:
        say("")
        rows = [row for one in found.policies for row in one.rows()]
        write_table(("IDENTITY", "DIRECTION", "ENFORCED", "POLICIES"), rows, "")
    for missing in found.unknown:
        note(f"not all is told: {missing}")
