"""`tessera cni`: the plugin and its network configuration, where container runtimes look.

Both are written whole or not at all, the plugin first: a configuration makes a node count as ready.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.options import DEFAULT_AGENT_SOCKET, AgentSocket, Output, examples
from services.cli.output import Format, note, say, write_json, write_table

if TYPE_CHECKING:
    from services.cli.conflist import Found

app = typer.Typer(no_args_is_help=True, help="The CNI plugin, for container runtimes.")

PLUGIN_MODULE = "datapath.cni"
INTERPRETER = Path("/usr/bin/python3")
STANDARD_DIRS = (Path("/opt/cni/bin"), Path("/usr/lib/cni"))
STATUS_DEADLINE_S = 15.0

BinDir = Annotated[Path, typer.Option(help="Where the runtime looks for plugins.", metavar="DIR")]
ConfDir = Annotated[Path, typer.Option(help="Where the runtime looks for networks.", metavar="DIR")]
FileName = Annotated[
    str, typer.Option("--file", help="Of the network, in that folder.", metavar="NAME")
]
DEFAULT_BIN = Path("/opt/cni/bin")
DEFAULT_CONF = Path("/etc/cni/net.d")
DEFAULT_FILE = "10-tessera.conflist"
DEFAULT_NETWORK = "tessera"


@app.command(
    epilog=examples(
        "tessera cni install",
        "tessera cni install --bin-dir /usr/lib/cni --network shop --file 20-shop.conflist",
    )
)
def install(
    bin_dir: BinDir = DEFAULT_BIN,
    conf_dir: ConfDir = DEFAULT_CONF,
    file: FileName = DEFAULT_FILE,
    *,
    network: Annotated[str, typer.Option(help="Its name.", metavar="NAME")] = DEFAULT_NETWORK,
    chain: Annotated[
        list[str] | None,
        typer.Option(
            help="A plugin to follow; repeatable. Default: portmap, if installed.", metavar="TYPE"
        ),
    ] = None,
    mtu: Annotated[
        int, typer.Option(help="Of containers' interfaces; 0: 1500.", min=0, max=65535, metavar="N")
    ] = 0,
    namespace: Annotated[
        str, typer.Option(help="Of containers that are no pods.", metavar="NAME")
    ] = "default",
    label: Annotated[
        list[str] | None,
        typer.Option("-l", "--label", help="Of every container; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET,
    force: Annotated[
        bool, typer.Option("--force", help="In spite of networks that come first.")
    ] = False,
) -> None:
    """Put the plugin and a network where container runtimes look."""
    from services.cli import conflist
    from services.runtime.errors import Conflict, Invalid

    if not conflist.is_configuration(file) or "/" in file:
        raise Invalid(f"--file {file}: a file name that ends in .conflist")
    if not INTERPRETER.exists():
        raise Invalid(f"the plugin needs {INTERPRETER} to run: install Python 3 there")
    chosen, missing = _chain(chain, bin_dir)
    found = _networks(conf_dir)
    obstacles = list(conflist.obstacles(file, network, found))
    if obstacles and not force:
        raise Conflict(
            f"{conf_dir}: {'; '.join(obstacles)}; move it away, choose another --file or "
            "--network, or pass --force"
        )
    wanted = conflist.Network(network, chosen, mtu, namespace, _labels(label or ()))
    plugin = bin_dir / conflist.PLUGIN
    _write(plugin, plugin_text(agent_socket), 0o755)
    _write(conf_dir / file, conflist.conflist(wanted), 0o644)
    say(f"installed {plugin} and {conf_dir / file} (network {network})")
    for line in (*obstacles, *missing):
        note(f"tessera: {line}")


@app.command(epilog=examples("tessera cni uninstall"))
def uninstall(
    bin_dir: BinDir = DEFAULT_BIN,
    conf_dir: ConfDir = DEFAULT_CONF,
    *,
    agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET,
    force: Annotated[
        bool, typer.Option("--force", help="The plugin, too, while containers still need it.")
    ] = False,
) -> None:
    """Remove every network of the plugin, and the plugin once no container needs it.

    A runtime deletes a container's interface through the plugin that made it.
    """
    from services.cli import conflist
    from services.runtime.errors import Conflict, Retry

    for one in _networks(conf_dir):
        if one.ours:
            (conf_dir / one.file).unlink()
            say(f"removed {conf_dir / one.file}")
    plugin = bin_dir / conflist.PLUGIN
    try:
        left = 0 if force else _containers(agent_socket)
    except Retry as error:
        raise Retry(f"{plugin} stays, or pass --force: {error}") from None
    if left:
        raise Conflict(
            f"{plugin} stays: {left} container interfaces are still to be deleted through it; stop "
            "those containers and run this again, or pass --force"
        )
    if plugin.exists():
        plugin.unlink()
        say(f"removed {plugin}")


@dataclass(frozen=True, slots=True)
class Check:
    what: str
    state: str
    remedy: str = ""


@app.command(epilog=examples("tessera cni status", "tessera cni status -o json"))
def status(
    bin_dir: BinDir = DEFAULT_BIN,
    conf_dir: ConfDir = DEFAULT_CONF,
    *,
    agent_socket: AgentSocket = DEFAULT_AGENT_SOCKET,
    output: Output = Format.TABLE,
) -> None:
    """Show whether a runtime would use the plugin, and whether the plugin would work.

    Exits with 1 when not.
    """
    from services.cli import conflist

    plugin = bin_dir / conflist.PLUGIN
    checks = [
        _check_plugin(plugin, agent_socket),
        *_check_networks(conf_dir),
        _check_agent(plugin),
    ]
    if output is Format.JSON:
        write_json(json.dumps({"checks": [asdict(check) for check in checks]}).encode())
    else:
        write_table(("CNI", "STATE"), [(check.what, check.state) for check in checks], "")
    for check in checks:
        if check.remedy:
            note(f"tessera: {check.what}: {check.remedy}")
    if any(check.remedy for check in checks):
        raise typer.Exit(1)


def _check_plugin(plugin: Path, agent_socket: str) -> Check:
    what = str(plugin)
    if not plugin.exists():
        return Check(what, "missing", "run `tessera cni install`")
    if not os.access(plugin, os.X_OK):
        return Check(what, "not executable", f"chmod +x {plugin}, or install it again")
    if plugin.read_bytes() != plugin_text(agent_socket):
        return Check(what, "another version or socket", "run `tessera cni install` again")
    return Check(what, "ok")


def _check_networks(conf_dir: Path) -> list[Check]:
    from services.cli import conflist

    found = _networks(conf_dir)
    ours = [one for one in found if one.ours]
    if not ours:
        return [Check(str(conf_dir), "no network of tessera", "run `tessera cni install`")]
    checks = []
    for one in ours:
        what = str(conf_dir / one.file)
        if one.types[0] != conflist.PLUGIN:
            chain = ", ".join(one.types)
            remedy = "tessera makes the interface: it must be the first plugin"
            checks.append(Check(what, f"chained as {chain}", remedy))
            continue
        obstacles = list(conflist.obstacles(one.file, one.network, found))
        checks.append(Check(what, f"ok, network {one.network}", "; ".join(obstacles)))
    return checks


def _check_agent(plugin: Path) -> Check:
    """As a runtime asks it: the plugin's own words."""
    import subprocess

    asked = b'{"cniVersion":"1.1.0","name":"status","type":"tessera"}'
    try:
        done = subprocess.run(
            [plugin],
            input=asked,
            env={"CNI_COMMAND": "STATUS"},
            capture_output=True,
            check=False,
            timeout=STATUS_DEADLINE_S,
        )
    except OSError as error:
        return Check("plugin STATUS", f"cannot run: {error.strerror}", "install it again")
    except subprocess.TimeoutExpired:
        return Check("plugin STATUS", "no answer", "see the agent's log")
    if done.returncode == 0:
        return Check("plugin STATUS", "ok")
    try:
        reason = str(json.loads(done.stdout)["msg"])
    except (ValueError, KeyError, TypeError):
        reason = done.stderr.decode(errors="replace").strip().partition("\n")[0] or "unreadable"
    return Check("plugin STATUS", "not available", reason)


def plugin_text(agent_socket: str) -> bytes:
    from importlib import resources

    from services.runtime.errors import Invalid

    path = agent_socket.removeprefix("unix://")
    if not path.startswith("/"):
        raise Invalid(f"--agent-socket {agent_socket}: the plugin needs an absolute path")
    text = resources.files(PLUGIN_MODULE).joinpath("forwarder.py").read_text()
    return text.replace(json.dumps(DEFAULT_AGENT_SOCKET), json.dumps(path)).encode()


def _chain(chain: list[str] | None, bin_dir: Path) -> tuple[list[str], list[str]]:
    """The plugins to follow, and what is to be said of them."""
    folders = (bin_dir, *STANDARD_DIRS)

    def there(name: str) -> bool:
        return any((folder / name).exists() for folder in folders)

    if chain is None:
        if there("portmap"):
            return ["portmap"], []
        return [], ["portmap is not installed: ports of containers cannot be published"]
    missing = [name for name in chain if not there(name)]
    where = ", ".join(map(str, dict.fromkeys(folders)))
    return chain, [f"plugin {name} is in none of {where}" for name in missing]


def _labels(pairs: list[str] | tuple[str, ...]) -> dict[str, str]:
    from services.runtime.errors import Invalid

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise Invalid(f"label {pair!r} is not KEY=VALUE")
        found[key] = value
    return found


def _networks(conf_dir: Path) -> list[Found]:
    from services.cli import conflist

    if not conf_dir.is_dir():
        return []
    return [
        conflist.read(path.name, path.read_bytes())
        for path in sorted(conf_dir.iterdir())
        if conflist.is_configuration(path.name) and path.is_file()
    ]


def _containers(agent_socket: str) -> int:
    """How many interfaces the agent made for runtimes."""
    from services.cli import client, views

    body = client.agent(agent_socket).get("/v1/endpoints")
    return sum(bool(one.container) for one in views.decode(body, views.Endpoints).endpoints)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Aside, then renamed; the name aside is one no runtime reads."""
    from services.runtime.errors import Unusable

    aside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.chmod(mode)
        aside.replace(path)
    except OSError as error:
        remedy = "; run as root" if isinstance(error, PermissionError) else ""
        raise Unusable(f"cannot write {path}: {error.strerror}{remedy}") from None
