"""`tessera ipam`: pools, and who has which address."""

from __future__ import annotations

import json
from typing import Annotated
from urllib.parse import quote

import typer

from services.cli.options import DEFAULT_SERVER, Output, Server, examples
from services.cli.output import Format, note, say, write_json, write_table

app = typer.Typer(no_args_is_help=True, help="Address pools, blocks and addresses.")
pool = typer.Typer(no_args_is_help=True, help="Address pools.")
address = typer.Typer(no_args_is_help=True, help="Addresses and their owners.")
app.add_typer(pool, name="pool")
app.add_typer(address, name="address")

_POOL_HEAD = ("POOL", "CIDRS", "BLOCKS", "NAMESPACES", "OPTIONS")
_USAGE_HEAD = ("POOL", "FAMILY", "USED", "CAPACITY", "%", "WINDOWS", "COOLING", "KEPT", "FORECAST")
_ADDRESS_HEAD = ("ADDRESS", "OWNER", "NODE", "POOL", "BLOCK", "STATE")
_BLOCK_HEAD = ("BLOCK", "NODE", "POOL", "USED", "SIZE", "WINDOW")
_LEAK_HEAD = ("ADDRESS", "OWNER", "NODE", "RELEASED", "REASON")

Name = Annotated[str, typer.Argument(metavar="POOL")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Cidrs = Annotated[
    list[str] | None,
    typer.Option("--cidr", help="IPv4 or IPv6; repeatable.", metavar="CIDR"),
]
Reserved = Annotated[
    list[str] | None,
    typer.Option("--reserved", help="Never handed out; repeatable.", metavar="CIDR"),
]
Disabled = Annotated[
    list[str] | None,
    typer.Option("--disabled", help="Nothing new is handed out; repeatable.", metavar="CIDR"),
]
Namespaces = Annotated[
    list[str] | None,
    typer.Option(
        "--namespace", help="Whose endpoints draw from it; * matches any.", metavar="PATTERN"
    ),
]
BlockSize = Annotated[int | None, typer.Option(help="Prefix length, IPv4.", metavar="N")]
BlockSizeV6 = Annotated[
    int | None, typer.Option("--block-size-v6", help="Prefix length, IPv6.", metavar="N")
]
Strict = Annotated[bool | None, typer.Option(help="Nodes borrow from each other's blocks.")]
MaxBlocks = Annotated[int | None, typer.Option(help="Of a node; 0 for any number.", metavar="N")]
Windows = Annotated[bool | None, typer.Option(help="Nodes hand out a window by themselves.")]
Cooldown = Annotated[
    int | None, typer.Option("--cooldown", help="Before an address is reused.", metavar="SECONDS")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be refused.")]


# ------------------------------------------------------------------ pools


@pool.command(
    epilog=examples(
        "tessera ipam pool create blue --cidr 10.50.0.0/16 --cidr fd50::/64 --namespace 'blue-*'"
    )
)
def create(
    name: Name,
    cidr: Cidrs = None,
    reserved: Reserved = None,
    disabled: Disabled = None,
    namespace: Namespaces = None,
    block_size: BlockSize = None,
    block_size_v6: BlockSizeV6 = None,
    borrow: Strict = None,
    max_blocks: MaxBlocks = None,
    windows: Windows = None,
    cooldown: Cooldown = None,
    dry_run: DryRun = False,
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """Create a pool."""
    spec = _spec(
        cidr, reserved, disabled, namespace, block_size, block_size_v6, borrow, max_blocks,
        windows, cooldown,
    )  # fmt: skip
    _put(name, {"cidrs": [], **spec}, {"create": "true"}, {}, dry_run, server, output)


@pool.command(
    epilog=examples(
        "tessera ipam pool update default --cidr 10.244.0.0/16 --cidr 10.245.0.0/16",
        "tessera ipam pool update default --disabled 10.244.128.0/17",
    )
)
def update(
    name: Name,
    cidr: Cidrs = None,
    reserved: Reserved = None,
    disabled: Disabled = None,
    namespace: Namespaces = None,
    block_size: BlockSize = None,
    block_size_v6: BlockSizeV6 = None,
    borrow: Strict = None,
    max_blocks: MaxBlocks = None,
    windows: Windows = None,
    cooldown: Cooldown = None,
    dry_run: DryRun = False,
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """Change a pool. What is not named stays; a list that is named is the whole list; "" empties
    it."""
    from services.cli import client

    body = client.server(server).get(f"/v1/ipam/pools/{quote(name, safe='')}")
    known = json.loads(body)
    spec = known["spec"] | _spec(
        cidr, reserved, disabled, namespace, block_size, block_size_v6, borrow, max_blocks,
        windows, cooldown,
    )  # fmt: skip
    guard = {"If-Match": f'"{known["revision"]}"'}
    _put(name, spec, {}, guard, dry_run, server, output)


@pool.command("list", epilog=examples("tessera ipam pool list"))
def list_pools(server: Server = DEFAULT_SERVER, output: Output = Format.TABLE) -> None:
    """List pools; `tessera ipam usage` says how full they are."""
    from services.cli import client, ipam_views, views

    body = client.server(server).get("/v1/ipam/pools")
    if output is Format.JSON:
        write_json(body)
        return
    found = views.decode(body, ipam_views.Pools)
    write_table(_POOL_HEAD, [p.row() for p in found.pools], "no pool: tessera ipam pool create")


@pool.command(epilog=examples("tessera ipam pool get default -o json"))
def get(name: Name, server: Server = DEFAULT_SERVER, output: Output = Format.TABLE) -> None:
    """Show one pool."""
    from services.cli import client, ipam_views, views

    body = client.server(server).get(f"/v1/ipam/pools/{quote(name, safe='')}")
    if output is Format.JSON:
        write_json(body)
        return
    found = views.decode(body, ipam_views.Pool)
    write_table(_POOL_HEAD, [found.row()], "")
    write_table(_USAGE_HEAD, found.usage_rows(), "")


@pool.command(epilog=examples("tessera ipam pool delete blue --yes"))
def delete(
    name: Name,
    yes: Yes = False,
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """Delete a pool of which no address is in use."""
    from services.cli import client

    door = client.server(server)
    path = f"/v1/ipam/pools/{quote(name, safe='')}"
    known = json.loads(door.get(path))
    _ask(f"delete pool {name} ({', '.join(known['spec']['cidrs'])})", yes)
    body = door.request("DELETE", path, headers={"If-Match": f'"{known["revision"]}"'})
    if output is Format.JSON:
        write_json(body)
        return
    say(f"pool {name} is deleted")


# ------------------------------------------------------------------ addresses


@address.command(
    "list",
    epilog=examples(
        "tessera ipam address list --node node-1", "tessera ipam address list --owner shop/"
    ),
)
def list_addresses(
    node: Annotated[str, typer.Option(help="Only of this node.", metavar="NODE")] = "",
    pool: Annotated[str, typer.Option(help="Only of this pool.", metavar="POOL")] = "",
    owner: Annotated[
        str, typer.Option(help="NAMESPACE/NAME, or NAMESPACE/ for all of it.", metavar="OWNER")
    ] = "",
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """List addresses and who has them."""
    from services.cli import client, ipam_views, views

    query: dict[str, str | int] = {"limit": 10_000}
    query |= {k: v for k, v in (("node", node), ("pool", pool), ("owner", owner)) if v}
    door = client.server(server)
    found: list[ipam_views.Address] = []
    while True:
        page = views.decode(door.get("/v1/ipam/addresses", query), ipam_views.Addresses)
        found += page.addresses
        if not page.next:
            break
        query["cursor"] = page.next
    if output is Format.JSON:
        import msgspec

        write_json(msgspec.json.encode({"addresses": found}))
        return
    write_table(_ADDRESS_HEAD, [one.row() for one in found], "no address is in use")


@app.command("who-has", epilog=examples("tessera ipam who-has 10.244.0.7"))
def who_has(
    ip: Annotated[str, typer.Argument(metavar="ADDRESS")],
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """Say whose address it is."""
    from services.cli import client, ipam_views, views

    body = client.server(server).get(f"/v1/ipam/addresses/{quote(ip, safe='')}")
    if output is Format.JSON:
        write_json(body)
        return
    write_table(_ADDRESS_HEAD, [views.decode(body, ipam_views.Address).row()], "")


@app.command(epilog=examples("tessera ipam blocks --node node-1"))
def blocks(
    node: Annotated[str, typer.Option(help="Only of this node.", metavar="NODE")] = "",
    pool: Annotated[str, typer.Option(help="Only of this pool.", metavar="POOL")] = "",
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """List which node draws from which block."""
    from services.cli import client, ipam_views, views

    query: dict[str, str | int] = {"limit": 10_000}
    query |= {k: v for k, v in (("node", node), ("pool", pool)) if v}
    body = client.server(server).get("/v1/ipam/blocks", query)
    if output is Format.JSON:
        write_json(body)
        return
    found = views.decode(body, ipam_views.Blocks)
    write_table(_BLOCK_HEAD, [one.row() for one in found.blocks], "no node holds a block")


@app.command(epilog=examples("tessera ipam usage", "tessera ipam usage -o json"))
def usage(server: Server = DEFAULT_SERVER, output: Output = Format.TABLE) -> None:
    """Say how full the pools are, and when they will be used up."""
    from services.cli import client, ipam_views, views

    body = client.server(server).get("/v1/ipam/pools")
    if output is Format.JSON:
        write_json(body)
        return
    found = views.decode(body, ipam_views.Pools)
    rows = [row for one in found.pools for row in one.usage_rows()]
    write_table(_USAGE_HEAD, rows, "no pool: tessera ipam pool create")


@app.command(epilog=examples("tessera ipam leaks"))
def leaks(server: Server = DEFAULT_SERVER, output: Output = Format.TABLE) -> None:
    """List addresses whose owner is doubted, why, and when they are released by themselves."""
    from services.cli import client, ipam_views, views

    body = client.server(server).get("/v1/ipam/leaks")
    if output is Format.JSON:
        write_json(body)
        return
    found = views.decode(body, ipam_views.Leaks)
    write_table(_LEAK_HEAD, [one.row() for one in found.leaks], "no address is doubted")


@app.command(
    epilog=examples("tessera ipam release 10.244.0.7", "tessera ipam release --node node-3 --yes")
)
def release(
    ip: Annotated[str, typer.Argument(metavar="[ADDRESS]")] = "",
    node: Annotated[
        str, typer.Option(help="All of a node that will not come back.", metavar="NODE")
    ] = "",
    force: Annotated[bool, typer.Option(help="Though it is in use.")] = False,
    yes: Yes = False,
    server: Server = DEFAULT_SERVER,
    output: Output = Format.TABLE,
) -> None:
    """Release an address, or all of a node, by hand."""
    from services.cli import client, ipam_views, views
    from services.runtime.errors import Invalid

    door = client.server(server)
    query: dict[str, str | int] = {"force": "true"} if force else {}
    if bool(ip) == bool(node):
        raise Invalid("give an address, or --node NODE")
    if node:
        _ask(f"release every address and block of node {node}", yes)
        body = door.request("DELETE", f"/v1/ipam/nodes/{quote(node, safe='')}", query)
        told = views.decode(body, ipam_views.Forgotten)
        words = f"{told.addresses} addresses and {told.blocks} blocks of {node} are released"
    else:
        path = f"/v1/ipam/addresses/{quote(ip, safe='')}"
        known = views.decode(door.get(path), ipam_views.Address)
        _ask(f"release {ip} of {known.who()} on node {known.node}", yes)
        guard = {"If-Match": f'"{known.revision}"'}
        body = door.request("DELETE", path, query, headers=guard)
        gone = views.decode(body, ipam_views.Released).released
        words = f"{', '.join(one.ip for one in gone)} of {known.who()}: released"
    if output is Format.JSON:
        write_json(body)
        return
    say(words)


# ------------------------------------------------------------------ shared


def _spec(
    cidr: list[str] | None,
    reserved: list[str] | None,
    disabled: list[str] | None,
    namespace: list[str] | None,
    block_size: int | None,
    block_size_v6: int | None,
    borrow: bool | None,  # noqa: FBT001
    max_blocks: int | None,
    windows: bool | None,  # noqa: FBT001
    cooldown: int | None,
) -> dict[str, object]:
    """What was named, as the body has it."""
    lists = {"cidrs": cidr, "reserved": reserved, "disabled": disabled, "namespaces": namespace}
    named: dict[str, object] = {
        key: [text for text in texts if text] for key, texts in lists.items() if texts is not None
    }
    single = {
        "block_size": block_size,
        "block_size_v6": block_size_v6,
        "strict": None if borrow is None else not borrow,
        "max_blocks": max_blocks,
        "local": windows,
        "cooldown_s": cooldown,
    }
    return named | {key: value for key, value in single.items() if value is not None}


def _put(
    name: str,
    spec: dict[str, object],
    query: dict[str, str | int],
    guard: dict[str, str],
    dry_run: bool,  # noqa: FBT001
    server: str,
    output: Format,
) -> None:
    from services.cli import client, ipam_views, views

    body = client.server(server).request(
        "PUT",
        f"/v1/ipam/pools/{quote(name, safe='')}",
        query | ({"dry_run": "true"} if dry_run else {}),
        body=json.dumps(spec).encode(),
        headers={"content-type": "application/json", **guard},
    )
    if output is Format.JSON:
        write_json(body)
        return
    written = views.decode(body, ipam_views.Written)
    say(f"pool {name}: {'would be ' if dry_run else ''}{written.action}")


def _ask(what: str, yes: bool) -> None:  # noqa: FBT001
    """Raises typer.Abort when the answer is no."""
    if not yes and not typer.confirm(f"{what}?", err=True):
        note("nothing was changed")
        raise typer.Abort
