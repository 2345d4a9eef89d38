"""`tessera bpf`: what the kernel holds, read from its maps; with an agent running or without.

With `-o json`: one row per line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, TypeVar

import typer

from services.cli import bpf_rows as shown
from services.cli import kernel, verify
from services.cli.kernel import DEFAULT_BPF_DIR, BpfDir, Names
from services.cli.options import DEFAULT_AGENT_SOCKET, AgentSocket, Output, examples
from services.cli.output import Format, say, write_table
from services.runtime.errors import Invalid

app = typer.Typer(no_args_is_help=True, help="What the kernel of this node holds.")
_ct = typer.Typer(no_args_is_help=True, help="Tracked connections.")
_policy = typer.Typer(no_args_is_help=True, help="Policy as the programs look it up.")
_ipcache = typer.Typer(no_args_is_help=True, help="Which address means which identity.")
_endpoint = typer.Typer(no_args_is_help=True, help="Endpoints as the programs know them.")
_metrics = typer.Typer(no_args_is_help=True, help="Packets forwarded and dropped, by reason.")
_map = typer.Typer(no_args_is_help=True, help="How full each map is.")
app.command("verify", epilog=examples("tessera bpf verify", "tessera bpf verify --repair -o json"))(
    verify.verify
)
for _name, _group in (
    ("policy", _policy),
    ("ipcache", _ipcache),
    ("ct", _ct),
    ("endpoint", _endpoint),
    ("metrics", _metrics),
    ("map", _map),
):
    app.add_typer(_group, name=_name)

T = TypeVar("T")

Endpoint = Annotated[
    str, typer.Option("--endpoint", help="Of this endpoint.", metavar="NAMESPACE/NAME|ID")
]
Identity = Annotated[
    int | None, typer.Option("--identity", help="Of this identity.", min=0, metavar="N")
]
Slot = Annotated[int | None, typer.Option("--slot", help="Of this policy slot.", min=0)]
Direction = Annotated[str, typer.Option("--direction", help="ingress or egress.", metavar="WAY")]
Proto = Annotated[str, typer.Option("--proto", help="TCP, UDP, ICMP or a number.", metavar="NAME")]
Port = Annotated[int | None, typer.Option("--port", min=0, max=65535, metavar="N")]
Address = Annotated[
    str, typer.Option("--address", help="An address, or what lies in a prefix.", metavar="CIDR")
]


def _show(
    lines: Iterable[str],
    output: Format,
    kind: type[T],
    head: Sequence[str],
    row: Callable[[T], Sequence[str]],
    empty: str,
) -> None:
    if output is Format.JSON:
        for line in lines:
            say(line)
        return
    from services.cli import views

    write_table(head, [row(views.decode(line.encode(), kind)) for line in lines], empty)


def _way(direction: str) -> str:
    if direction not in ("", "ingress", "egress"):
        raise Invalid(f"direction {direction!r} is neither ingress nor egress")
    return direction


def _ends(address: str, identity: int | None, proto: str, port: int | None) -> Mapping[str, object]:
    return {"address": address, "identity": identity, "proto": proto.upper(), "port": port}


@_endpoint.command("list", epilog=examples("tessera bpf endpoint list"))
def endpoint_list(
    *,
    identity: Identity = None,
    address: Address = "",
    bpf_dir: BpfDir = DEFAULT_BPF_DIR,
    agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET,
    output: Output = Format.TABLE,
) -> None:
    """List the endpoints whose packets are judged."""
    names = Names(agent_socket)
    lines = kernel.ask(bpf_dir, "endpoint", {"identity": identity, "address": address})
    _show(
        lines, output, shown.Endpoint, shown.ENDPOINT_HEAD,
        lambda row: shown.endpoint(row, names), "no endpoint",
    )  # fmt: skip


@_policy.command(
    "list",
    epilog=examples(
        "tessera bpf policy list --endpoint shop/db", "tessera bpf policy list --port 80"
    ),
)
def policy_list(
    *,
    endpoint: Endpoint = "",
    direction: Direction = "",
    identity: Identity = None,
    proto: Proto = "",
    port: Port = None,
    slot: Slot = None,
    bpf_dir: BpfDir = DEFAULT_BPF_DIR,
    agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET,
    output: Output = Format.TABLE,
) -> None:
    """List the answers of every policy slot.

    Peers with the same answer share a row. A slot is one direction of one identity.
    """
    names = Names(agent_socket)
    choice = {
        "endpoint": names.number_of(endpoint) if endpoint else None,
        "direction": _way(direction),
        "identity": identity,
        "proto": proto.upper(),
        "port": port,
        "slot": slot,
    }
    _show(
        kernel.ask(bpf_dir, "policy", choice), output, shown.Policy, shown.POLICY_HEAD,
        lambda row: shown.policy(row, names), "no such answer",
    )  # fmt: skip


@_ipcache.command(
    "list",
    epilog=examples("tessera bpf ipcache list", "tessera bpf ipcache list --address 10.244.0.7"),
)
def ipcache_list(
    *,
    address: Address = "",
    identity: Identity = None,
    bpf_dir: BpfDir = DEFAULT_BPF_DIR,
    output: Output = Format.TABLE,
) -> None:
    """List addresses and prefixes with their identities.

    `--address` with a single address also shows the prefixes that hold it, the narrowest first.
    """
    lines = kernel.ask(bpf_dir, "ipcache", {"address": address, "identity": identity})
    _show(lines, output, shown.Ipcache, shown.IPCACHE_HEAD, shown.ipcache, "no such address")


@_ct.command("list", epilog=examples("tessera bpf ct list --address 10.244.0.7 --proto tcp"))
def ct_list(
    *,
    address: Address = "",
    identity: Identity = None,
    proto: Proto = "",
    port: Port = None,
    bpf_dir: BpfDir = DEFAULT_BPF_DIR,
    agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET,
    output: Output = Format.TABLE,
) -> None:
    """List tracked connections, each with the rules that let it through."""
    names = Names(agent_socket)
    lines = kernel.ask(bpf_dir, "ct", _ends(address, identity, proto, port))
    _show(
        lines, output, shown.Connection, shown.CONNECTION_HEAD,
        lambda row: shown.connection(row, names), "no such connection",
    )  # fmt: skip


@_ct.command("top", epilog=examples("tessera bpf ct top -n 5 --interval 3"))
def ct_top(
    *,
    count: Annotated[int, typer.Option("-n", help="How many.", min=1, metavar="N")] = 10,
    interval: Annotated[
        float, typer.Option(help="Seconds between the two looks.", min=0.1, max=3600.0)
    ] = 1.0,
    address: Address = "",
    identity: Identity = None,
    proto: Proto = "",
    port: Port = None,
    bpf_dir: BpfDir = DEFAULT_BPF_DIR,
    output: Output = Format.TABLE,
) -> None:
    """Show the connections that move the most, by bytes per second."""
    from itertools import islice

    choice = _ends(address, identity, proto, port)
    lines = kernel.ask(bpf_dir, "top", choice, interval_s=interval)
    chosen = list(islice(lines, count))
    _show(chosen, output, shown.Talker, shown.TALKER_HEAD, shown.talker, "nothing moved")


@_ct.command("flush", epilog=examples("tessera bpf ct flush --address 10.244.0.7"))
def ct_flush(
    *,
    every: Annotated[bool, typer.Option("--all", help="Every connection.")] = False,
    address: Address = "",
    identity: Identity = None,
    proto: Proto = "",
    port: Port = None,
    bpf_dir: BpfDir = DEFAULT_BPF_DIR,
    output: Output = Format.TABLE,
) -> None:
    """Forget tracked connections: their next packets are judged by the policy in force.

    A reply is let through because its connection is tracked. Forgotten, it is judged like any
    packet, so an open connection may break where only one direction is allowed.
    """
    choice = _ends(address, identity, proto, port)
    given = any(value not in (None, "") for value in choice.values())
    if given == every:
        raise Invalid("flush what? give --all, or --address, --identity, --proto or --port")
    lines = list(kernel.ask(bpf_dir, "flush", choice))
    if output is Format.JSON:
        say(lines[0])
        return
    from services.cli import views

    number = views.decode(lines[0].encode(), shown.Count).count
    say(f"forgot {number} connection{'' if number == 1 else 's'}")


@_metrics.command("list", epilog=examples("tessera bpf metrics list"))
def metrics_list(
    *,
    direction: Direction = "",
    bpf_dir: BpfDir = DEFAULT_BPF_DIR,
    output: Output = Format.TABLE,
) -> None:
    """Count packets by what became of them, since the maps were made."""
    lines = kernel.ask(bpf_dir, "metrics", {"direction": _way(direction)})
    _show(lines, output, shown.Metric, shown.METRIC_HEAD, shown.metric, "no packet yet")


@_map.command("list", epilog=examples("tessera bpf map list"))
def map_list(*, bpf_dir: BpfDir = DEFAULT_BPF_DIR, output: Output = Format.TABLE) -> None:
    """Show how full each map is."""
    lines = kernel.ask(bpf_dir, "map", {})
    _show(lines, output, shown.Map, shown.MAP_HEAD, shown.map_, "no map")
