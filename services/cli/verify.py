"""`tessera bpf verify`: what the agent wants against what the kernel has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.cli import bpf_rows as shown
from services.cli import kernel
from services.cli.kernel import ASK_DEADLINE_S, DEFAULT_BPF_DIR, BpfDir
from services.cli.options import DEFAULT_AGENT_SOCKET, AgentSocket, Output
from services.cli.output import Format, note, say, write_table
from services.runtime.errors import Retry


def verify(
    *,
    repair: Annotated[
        bool, typer.Option("--repair", help="Write what is wanted where it differs.")
    ] = False,
    bpf_dir: BpfDir = DEFAULT_BPF_DIR,
    agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET,
    output: Output = Format.TABLE,
) -> None:
    """Compare every row the agent stands for with the kernel's.

    Exits with 1 when something differs and was not repaired. Without a running agent nobody knows
    what is wanted; then it is checked that the tables agree with each other and with the programs.
    """
    from services.cli import client, views

    door = client.agent(agent_socket)
    query: dict[str, str | int] = {"repair": 1} if repair else {}
    try:
        body = door.request("POST", "/v1/verify", query, deadline_s=ASK_DEADLINE_S)
    except Retry as error:
        if repair:
            raise
        note(f"tessera: {error}; checking only that the tables agree with each other")
        _consistent(bpf_dir, output)
        return
    report = views.decode(body, shown.Report)
    if output is Format.JSON:
        say(body.decode())
    else:
        _tell(report)
    if report.different and not report.repaired:
        raise typer.Exit(1)


def _tell(report: shown.Report) -> None:
    rows = sum(report.rows.values())
    if report.unconfirmed:
        note("policyd has not spoken since the agent started: addresses were not compared")
    if not report.different:
        say(f"{rows} rows, all as wanted")
        return
    write_table(shown.FINDING_HEAD, map(shown.finding, report.differences), "")
    untold = report.different - len(report.differences)
    note(
        f"{report.different} of {rows} rows {'were' if report.repaired else 'are'} not as wanted"
        + (f", {untold} of them not shown" if untold else "")
        + ("; repaired" if report.repaired else "; mend them with: tessera bpf verify --repair")
    )


def _consistent(bpf_dir: Path, output: Format) -> None:
    found = list(kernel.rows(bpf_dir, "consistency", shown.Finding, {}))
    if output is Format.JSON:
        import msgspec

        say(msgspec.json.encode({"different": len(found), "differences": found}).decode())
    elif found:
        write_table(shown.FINDING_HEAD, map(shown.finding, found), "")
    else:
        say("the tables agree with each other")
    if found:
        raise typer.Exit(1)
