"""Where one machine's node keeps its files, and the configuration its processes are started with.

    the user's TOML ──┐
    defaults of `up` ─┴─► node_config() ──► <run_dir>/tessera.toml ──► --config of every process

The user's file wins, key by key; targets follow the addresses the services really listen on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from services.runtime.errors import Invalid

Value: TypeAlias = "str | int | float | bool | list[Value] | dict[str, Value]"
Table: TypeAlias = dict[str, Value]

SERVICES = ("identityd", "ipamd", "policyd")
PROCESSES = (*SERVICES, "apid", "agent")
MODULES: Mapping[str, str] = {
    "identityd": "services.identityd.main",
    "ipamd": "services.ipamd.main",
    "policyd": "services.policyd.main",
    "apid": "services.apid.main",
    "agent": "datapath.agent.main",
}
API_LISTEN = "127.0.0.1:7400"
# Not 2379: a machine may run an etcd of its own, and Debian's package starts one.
ETCD_CLIENT_PORT = 7479
# sun_path holds 108 bytes, the terminating zero included (unix(7)).
_SOCKET_PATH_MAX = 107
# Variables of the command line itself; a process would refuse them as unknown configuration.
CLI_VARIABLES = ("TESSERA_SERVER", "TESSERA_AGENT_SOCKET", "TESSERA_BPF_DIR")


@dataclass(frozen=True, slots=True)
class Layout:
    state_dir: Path = Path("/var/lib/tessera")
    run_dir: Path = Path("/run/tessera")
    bpf_dir: Path = Path("/sys/fs/bpf/tessera")

    def __post_init__(self) -> None:
        if len(str(self.socket("identityd"))) > _SOCKET_PATH_MAX:
            raise Invalid(
                f"run directory {self.run_dir} is too long for the sockets in it "
                f"({_SOCKET_PATH_MAX} bytes with the name); choose a shorter one with --run-dir"
            )

    def socket(self, process: str) -> Path:
        return self.run_dir / f"{process}.sock"

    @property
    def etcd_data(self) -> Path:
        return self.state_dir / "etcd"

    @property
    def log_dir(self) -> Path:
        return self.run_dir / "log"

    @property
    def config_file(self) -> Path:
        return self.run_dir / "tessera.toml"

    @property
    def lock_file(self) -> Path:
        return self.run_dir / "up.lock"


def layout_of(user: Table, *, state_dir: Path | None = None, run_dir: Path | None = None) -> Layout:
    """Command line over the file's [agent] table over the defaults."""
    agent = table(user, "agent")
    standard = Layout()
    return Layout(
        state_dir or Path(str(agent.get("state_dir", standard.state_dir))),
        run_dir or Path(str(agent.get("run_dir", standard.run_dir))),
        Path(str(agent.get("bpf_dir", standard.bpf_dir))),
    )


def node_config(user: Table, layout: Layout, etcd_endpoints: Sequence[str]) -> Table:
    """The whole file: `user` over what `up` chooses, with the three directories as given."""
    config: Table = {name: dict(table(user, name)) for name in user}
    section(config, "etcd")["endpoints"] = list(etcd_endpoints)
    for name in SERVICES:
        section(config, name).setdefault("listen", f"unix://{layout.socket(name)}")
    for key in ("cluster", "fixed_identities"):
        value = table(config, "identityd").get(key)
        if value is not None:
            section(config, "policyd").setdefault(key, value)
    section(config, "apid").setdefault("listen", API_LISTEN)
    for consumer in ("apid", "agent"):
        targets = section(config, consumer)
        for name in SERVICES:
            targets.setdefault(name, section(config, name)["listen"])
    section(config, "agent").update(
        state_dir=str(layout.state_dir), run_dir=str(layout.run_dir), bpf_dir=str(layout.bpf_dir)
    )
    return config


def configured_etcd(user: Table) -> tuple[str, ...]:
    """Endpoints the user's file names; empty means `up` runs an etcd of its own."""
    endpoints = table(user, "etcd").get("endpoints", [])
    return tuple(str(one) for one in endpoints) if isinstance(endpoints, list) else ()


def table(config: Table, name: str) -> Table:
    found = config.get(name, {})
    if not isinstance(found, dict):
        raise Invalid(f"configuration: [{name}] must be a table, not {found!r}")
    return found


def section(config: Table, name: str) -> Table:
    found = table(config, name)
    config[name] = found
    return found


def dump(config: Table) -> str:
    """TOML text that tomllib reads back to `config`."""
    return "\n".join(_dump_table(config, ())).lstrip("\n") + "\n"


def _dump_table(content: Table, path: tuple[str, ...]) -> list[str]:
    plain = {key: value for key, value in content.items() if not isinstance(value, dict)}
    lines = []
    if path and (plain or not content):
        lines += ["", f"[{'.'.join(_key(part) for part in path)}]"]
    lines += [f"{_key(key)} = {_literal(value)}" for key, value in plain.items()]
    for key, value in content.items():
        if isinstance(value, dict):
            lines += _dump_table(value, (*path, key))
    return lines


def _key(text: str) -> str:
    bare = text.isascii() and text.replace("_", "").replace("-", "").isalnum()
    return text if bare else _literal(text)


def _literal(value: Value) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_literal(one) for one in value)}]"
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(key)} = {_literal(one)}" for key, one in value.items())
        return f"{{{inner}}}"
    # A JSON string, number or boolean is a TOML one; U+007F alone needs an escape JSON omits.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def child_environ(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in CLI_VARIABLES}
