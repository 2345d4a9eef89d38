"""`tessera observe`: the verdicts of this node as they fall, each with the rule that gave it.

The agent filters by verdict; endpoints and ports are matched here, where either can be written as
people name them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import DEFAULT_AGENT_SOCKET, AgentSocket, Output
from services.cli.output import Format, on_terminal, say, say_styled, verdict_style

if TYPE_CHECKING:
    from services.flows.flow import Flow, Party

DEFAULT_LAST = 20


class Verdict(StrEnum):
    FORWARDED = "forwarded"
    DROPPED = "dropped"
    REDIRECTED = "redirected"


@dataclass(frozen=True, slots=True)
class Ends:
    """`source`, `destination`: namespace/name, namespace/, an address or an identity."""

    source: str = ""
    destination: str = ""
    port: int = 0

    def match(self, flow: Flow) -> bool:
        return (
            (not self.source or _is(flow.source, self.source))
            and (not self.destination or _is(flow.destination, self.destination))
            and (not self.port or flow.destination.port == self.port)
        )


def observe(
    *,
    last: Annotated[
        int, typer.Option(help="How many past verdicts.", min=0, metavar="N")
    ] = DEFAULT_LAST,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Then keep printing.")] = False,
    verdict: Annotated[
        Verdict | None,
        typer.Option(
            help="Only these.", case_sensitive=False, metavar="forwarded|dropped|redirected"
        ),
    ] = None,
    from_: Annotated[
        str,
        typer.Option(
            "--from", help="namespace/name, namespace/, address or identity.", metavar="WHO"
        ),
    ] = "",
    to: Annotated[str, typer.Option(help="As --from.", metavar="WHO")] = "",
    port: Annotated[
        int, typer.Option(help="Destination port; 0: any.", min=0, max=65535, metavar="N")
    ] = 0,
    agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET,
    output: Output = Format.TABLE,
) -> None:
    """Show verdicts. With `-o json`: one flow per line."""
    from services.cli import client
    from services.flows.flow import decode_line

    ends = Ends(from_, to, port)
    query: dict[str, str | int] = {"verdict": verdict.upper()} if verdict is not None else {}
    if follow:
        query |= {"follow": 1, "last": last}
    elif ends == Ends():
        query["last"] = last
    # Otherwise all it remembers: the agent counts before `ends` chooses.
    lines = client.agent(agent_socket).lines("/v1/events", query)
    chosen: Iterable[bytes] = (line for line in lines if ends.match(decode_line(line)))
    if not follow:
        chosen = deque(chosen, maxlen=last)
    for line in chosen:
        if output is Format.JSON:
            say(line.decode())
        else:
            _tell(decode_line(line))


def _tell(flow: Flow) -> None:
    """On a terminal what does not fit goes on, indented, below."""
    if not on_terminal():
        say(text(flow))
        return
    head, verdict, ends, why = parts(flow, _short)
    style = verdict_style(verdict)
    say_styled([(f"{head} ", "dim"), (f"{verdict:<9} ", style), (f"{ends}  ", ""), (why, "dim")])


def text(flow: Flow) -> str:
    """One flow on one line."""
    head, verdict, ends, why = parts(flow, _full)
    return f"{head} {verdict:<9} {ends}  {why}"


def parts(flow: Flow, party: Callable[[Party], str]) -> tuple[str, str, str, str]:
    """When, verdict, between whom, why."""
    moment = flow.time.partition("T")[2][:12] or flow.time
    detail = f" {flow.tcp_flags}" if flow.tcp_flags else ""
    if flow.proto == "ICMP":
        detail = f" type {flow.icmp_type}"
    reason = f"{flow.drop_reason_desc}: " if flow.drop_reason_desc else ""
    ends = f"{party(flow.source)} -> {party(flow.destination)} {flow.proto}{detail}"
    return moment, flow.verdict, f"{flow.direction:<7} {ends}", f"{reason}{flow.rule}"


def _full(party: Party) -> str:
    port = f":{party.port}" if party.port else ""
    name = f"{party.namespace}/{party.name} " if party.name else ""
    return f"{name}{party.ip}{port} ({party.identity})"


def _short(party: Party) -> str:
    """Without the address where there is a name."""
    port = f":{party.port}" if party.port else ""
    name = f"{party.namespace}/{party.name}" if party.name else party.ip
    return f"{name}{port} ({party.identity})"


def _is(party: Party, wanted: str) -> bool:
    if wanted.endswith("/"):
        return party.namespace == wanted[:-1]
    if "/" in wanted:
        return f"{party.namespace}/{party.name}" == wanted
    return wanted in (party.ip, str(party.identity), party.name)
