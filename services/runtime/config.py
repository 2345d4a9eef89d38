"""Configuration: one TOML file, TESSERA_<SECTION>_<KEY> over it, one frozen struct per process.

A process reads its own table and the common ones ([etcd], [log], [telemetry]); the other
processes' tables may stand in the same file. Every key has a default; an unknown table, key or
variable is refused by name. Lists in the environment are comma-separated; tables within a table
(address pools) can only be given in the file.
"""

from __future__ import annotations

import socket
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from typing import Annotated, Final, Protocol, TypeVar, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct, field

from ipam.keys import PoolRecord
from services.runtime.errors import Invalid
from services.runtime.log import LEVELS
from services.runtime.values import check, check_listeners, is_host_port

COMMON_SECTIONS: Final = ("etcd", "log", "telemetry")
PROCESS_SECTIONS: Final = ("identityd", "ipamd", "policyd", "apid", "agent")
UNKNOWN_LABELS: Final = ("retry", "init")
WHEN_STALE: Final = ("report", "refuse")
ATTACH: Final = ("auto", "tcx", "clsact")
CIDR_MODES: Final = ("cilium", "addresses")
ROUTING: Final = ("direct", "overlay", "none")
SECRET_KEYS: Final = frozenset({"password"})

Seconds = Annotated[float, Meta(gt=0)]
WholeSeconds = Annotated[int, Meta(gt=0)]


class EtcdConfig(Struct, frozen=True, forbid_unknown_fields=True):
    endpoints: tuple[str, ...] = ("127.0.0.1:2379",)
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    username: str = ""
    password: str = ""
    request_timeout_s: Seconds = 5.0

    def __post_init__(self) -> None:
        for endpoint in self.endpoints:
            check(
                is_host_port(endpoint.removeprefix("http://").removeprefix("https://")),
                f"endpoints: {endpoint!r} is not host:port",
            )


class LogConfig(Struct, frozen=True, forbid_unknown_fields=True):
    level: str = "info"
    json: bool = False

    def __post_init__(self) -> None:
        check(self.level in LEVELS, f"level: {self.level!r} is none of {', '.join(LEVELS)}")


class TelemetryConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`otlp_endpoint` empty: spans carry trace context but are not exported."""

    otlp_endpoint: str = ""


class PoolConfig(PoolRecord, frozen=True, forbid_unknown_fields=True):
    """ipam.pool.Pool says what the keys mean; it is also what an operator may give over REST."""

    cidrs: tuple[str, ...] = ("10.244.0.0/16",)

    def __post_init__(self) -> None:
        for cidr in (*self.cidrs, *self.reserved, *self.disabled):
            try:
                ip_network(cidr)
            except ValueError as error:
                raise ValueError(f"{cidr!r} is not a CIDR: {error}") from None


class IdentitydConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`max_clusters`: 255 or 511, alike in a whole mesh. `fixed_identities`: "128=kv-store".
    `pressed_quarantine_s`: how long a number rests at least once no other is left. The last four
    hold until label rules are set in the cluster."""

    etcd: EtcdConfig = EtcdConfig()
    log: LogConfig = LogConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    listen: str = "127.0.0.1:7401"
    metrics_listen: str = "127.0.0.1:7411"
    cluster: str = "default"
    cluster_id: Annotated[int, Meta(ge=0, le=511)] = 0
    max_clusters: int = 255
    session_ttl_s: WholeSeconds = 300
    gc_grace_s: WholeSeconds = 300
    quarantine_s: WholeSeconds = 1800
    pressed_quarantine_s: WholeSeconds = 30
    fixed_identities: tuple[str, ...] = ()
    label_filter: tuple[str, ...] = ()
    policy_relevant: bool = False
    namespace_quota: Annotated[int, Meta(ge=0)] = 4096
    warn_values: Annotated[int, Meta(ge=2)] = 100

    def __post_init__(self) -> None:
        check_listeners(self.listen, self.metrics_listen)
        check(
            self.max_clusters in (255, 511),
            f"max_clusters: {self.max_clusters} is neither 255 nor 511",
        )
        check(
            self.pressed_quarantine_s <= self.quarantine_s,
            f"pressed_quarantine_s: {self.pressed_quarantine_s} is longer than quarantine_s",
        )


class IpamdConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`release_cooldown_s`: how long a released address is handed to nobody; 0 for not at all.
    `node_gone_s`: a node not heard from for so long is taken for dead, and its addresses for free.
    """

    etcd: EtcdConfig = EtcdConfig()
    log: LogConfig = LogConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    listen: str = "127.0.0.1:7402"
    metrics_listen: str = "127.0.0.1:7412"
    release_cooldown_s: Annotated[int, Meta(ge=0)] = 30
    node_gone_s: Annotated[int, Meta(ge=30)] = 86_400
    pools: dict[str, PoolConfig] = field(default_factory=lambda: {"default": PoolConfig()})

    def __post_init__(self) -> None:
        check_listeners(self.listen, self.metrics_listen)


class PolicydConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`cluster`, `fixed_identities`: identityd's. `cidr_match` of Cilium kinds, `ipblock_match` of
    NetworkPolicies: `cilium` chooses addresses outside of the cluster only, `addresses` endpoints
    and nodes, too. `policy_peer_max`: the smallest of the agents'. `protected`: what nodes must be
    able to reach, each a selector and a port ("app=etcd 2379/TCP"); policies that cut it off are
    refused."""

    etcd: EtcdConfig = EtcdConfig()
    log: LogConfig = LogConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    listen: str = "127.0.0.1:7403"
    metrics_listen: str = "127.0.0.1:7413"
    cluster: str = "default"
    fixed_identities: tuple[str, ...] = ()
    cidr_match: str = "cilium"
    ipblock_match: str = "addresses"
    policy_peer_max: Annotated[int, Meta(ge=1024)] = 1_048_576
    protected: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_listeners(self.listen, self.metrics_listen)
        for key in ("cidr_match", "ipblock_match"):
            mode = getattr(self, key)
            check(mode in CIDR_MODES, f"{key}: {mode!r} is none of {', '.join(CIDR_MODES)}")


class ApidConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Metrics are served on `listen` too."""

    log: LogConfig = LogConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    listen: str = "127.0.0.1:7400"
    identityd: str = "127.0.0.1:7401"
    ipamd: str = "127.0.0.1:7402"
    policyd: str = "127.0.0.1:7403"

    def __post_init__(self) -> None:
        check_listeners(self.listen, "")


def targets(text: str) -> tuple[str, ...]:
    """Of a key that names one process or several replicas of it, divided by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


class AgentConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """`policyd`: one target, or those of all replicas, divided by commas. `node_ip` empty: the
    first IPv4 address that is not loopback. `bpf_object` empty: the object shipped in the package.
    `labels_dir`: labels of containers that come by CNI.
    `endpoints_dir`: endpoints that are to be. `attach`: auto, tcx or clsact. `routing`:
    direct, by a route through the other node; overlay, by VXLAN; none where the network knows the
    way. `masquerade`: endpoints go out to the world under the node's address. `devices` that lead
    out; empty: those with `node_ip`. `host_firewall`: policies with a nodeSelector judge what the
    node itself sends and gets, but never TCP to its `control_ports`, nor its own to the services.
    `unknown_labels`: while identityd is away, a new endpoint whose labels are not known here is
    refused (retry) or gets the identity `init` meanwhile. `stale_after_s`: how long without policyd
    until policy counts as stale, 0 for never; `when_stale`: say so (report), or also refuse new
    endpoints. `..._max`: entries of a BPF map; datapath.maps.tables.Sizes has the same names."""

    log: LogConfig = LogConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    node_name: str = field(default_factory=socket.gethostname)
    node_ip: str = ""
    state_dir: str = "/var/lib/tessera"
    run_dir: str = "/run/tessera"
    bpf_dir: str = "/sys/fs/bpf/tessera"
    labels_dir: str = "/etc/tessera/labels"
    endpoints_dir: str = "/etc/tessera/endpoints"
    bpf_object: str = ""
    identityd: str = "127.0.0.1:7401"
    ipamd: str = "127.0.0.1:7402"
    policyd: str = "127.0.0.1:7403"
    metrics_listen: str = "127.0.0.1:7414"
    allow_localhost: bool = True
    attach: str = "auto"
    unknown_labels: str = "retry"
    routing: str = "direct"
    tunnel_port: Annotated[int, Meta(ge=1, le=65535)] = 8472
    masquerade: bool = False
    devices: tuple[str, ...] = ()
    stale_after_s: Annotated[float, Meta(ge=0)] = 0
    when_stale: str = "report"
    host_firewall: bool = False
    control_ports: tuple[Annotated[int, Meta(ge=1, le=65535)], ...] = (22, 7400, 7401, 7402, 7403)
    endpoints_max: Annotated[int, Meta(ge=16)] = 4096
    ipcache4_max: Annotated[int, Meta(ge=1024)] = 262_144
    ipcache4_prefix_max: Annotated[int, Meta(ge=1024)] = 65_536
    ipcache6_max: Annotated[int, Meta(ge=1024)] = 262_144
    ipcache6_prefix_max: Annotated[int, Meta(ge=1024)] = 65_536
    policy_slots_max: Annotated[int, Meta(ge=64)] = 65_536
    policy_peer_max: Annotated[int, Meta(ge=1024)] = 1_048_576
    policy_port_max: Annotated[int, Meta(ge=1024)] = 262_144
    policy_range_max: Annotated[int, Meta(ge=1024)] = 65_536
    ct_max: Annotated[int, Meta(ge=1024)] = 131_072
    nat_max: Annotated[int, Meta(ge=1024)] = 131_072
    events_bytes: Annotated[int, Meta(ge=4096)] = 4_194_304

    def __post_init__(self) -> None:
        check_listeners("", self.metrics_listen)
        check(bool(targets(self.policyd)), "policyd: names no target")
        check(
            self.unknown_labels in UNKNOWN_LABELS,
            f"unknown_labels: {self.unknown_labels!r} is none of {', '.join(UNKNOWN_LABELS)}",
        )
        check(self.attach in ATTACH, f"attach: {self.attach!r} is none of {', '.join(ATTACH)}")
        check(
            self.when_stale in WHEN_STALE,
            f"when_stale: {self.when_stale!r} is none of {', '.join(WHEN_STALE)}",
        )
        check(self.routing in ROUTING, f"routing: {self.routing!r} is none of {', '.join(ROUTING)}")
        check(
            self.node_name.isprintable() and self.node_name.strip("/ ") == self.node_name != "",
            f"node_name: {self.node_name!r} is empty or holds what a name cannot",
        )
        if self.node_ip:
            try:
                IPv4Address(self.node_ip)
            except ValueError as error:
                raise ValueError(f"node_ip: {error}") from None
        for key in ("state_dir", "run_dir", "bpf_dir", "labels_dir", "endpoints_dir"):
            path = getattr(self, key)
            check(path.startswith("/"), f"{key}: {path!r} is not an absolute path")


# ------------------------------------------------------------------ reading


CLASSES: Final[Mapping[str, type[Struct]]] = {
    "identityd": IdentitydConfig,
    "ipamd": IpamdConfig,
    "policyd": PolicydConfig,
    "apid": ApidConfig,
    "agent": AgentConfig,
}


class ProcessConfig(Protocol):
    """What every process has, whatever else."""

    @property
    def log(self) -> LogConfig: ...
    @property
    def telemetry(self) -> TelemetryConfig: ...


C = TypeVar("C", bound=Struct)
_Table = dict[str, object]


def load(cls: type[C], section: str, path: Path | None, environ: Mapping[str, str]) -> C:
    """Raises `Invalid` naming the key and where it was read."""
    document = _read(path) if path is not None else {}
    common: set[str] = {name for name in COMMON_SECTIONS if name in cls.__struct_fields__}
    own = _table(document, section, path)
    _refuse_unknown(own, set(cls.__struct_fields__) - common, section, str(path))
    merged: _Table = {**own, **_from_environ(cls, section, environ, skip=common)}
    hints = get_type_hints(cls)
    for name in common:
        table = _table(document, name, path)
        _refuse_unknown(table, set(hints[name].__struct_fields__), name, str(path))
        merged[name] = {**table, **_from_environ(hints[name], name, environ, skip=set())}
    try:
        return msgspec.convert(merged, cls)
    except msgspec.ValidationError as error:
        raise Invalid(_told(str(error), section, path, environ)) from None


def _told(error: str, section: str, path: Path | None, environ: Mapping[str, str]) -> str:
    """From msgspec's `words - at `$.key`` to `file: section.key: words`."""
    words, _, place = error.rpartition(" - at `$")
    if not words:
        words, place = error, ""
    keys = [key for key in place.strip("`").replace("[...]", "").split(".") if key]
    if keys[:1] and keys[0] in COMMON_SECTIONS:
        section, *keys = keys
    named = keys or [words.partition(":")[0]]
    variable = f"TESSERA_{section}_{named[0]}".upper()
    where = f"environment variable {variable}" if variable in environ else str(path)
    return f"{where}: {'.'.join((section, *keys))}{': ' if keys else '.'}{words}"


def shown(config: Struct) -> dict[str, object]:
    """The configuration as it may be printed: secrets replaced."""
    return _without_secrets(msgspec.to_builtins(config))


def _read(path: Path) -> _Table:
    try:
        document: _Table = tomllib.loads(path.read_text())
    except OSError as error:
        raise Invalid(f"config file {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"config file {path} is not TOML: {error}") from None
    for name in document:
        if name not in COMMON_SECTIONS + PROCESS_SECTIONS:
            known = ", ".join(COMMON_SECTIONS + PROCESS_SECTIONS)
            raise Invalid(f"{path}: unknown table [{name}]; known: {known}")
    return document


def _table(document: _Table, name: str, path: Path | None) -> _Table:
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise Invalid(f"{path}: {name} must be a table: [{name}]")
    return table


def _refuse_unknown(table: _Table, known: set[str], section: str, where: str) -> None:
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise Invalid(f"{where}: unknown key {section}.{key}; {hint}")


def _from_environ(
    cls: type[Struct], section: str, environ: Mapping[str, str], skip: set[str]
) -> _Table:
    prefix = f"TESSERA_{section.upper()}_"
    hints = get_type_hints(cls, include_extras=True)
    values: _Table = {}
    for variable in sorted(environ):
        if not variable.startswith(prefix):
            continue
        key = variable.removeprefix(prefix).lower()
        if key not in hints or key in skip or get_origin(hints[key]) is dict:
            raise Invalid(f"environment variable {variable} names no key of [{section}]; unset it")
        values[key] = _parse(variable, environ[variable], hints[key])
    return values


def _parse(variable: str, text: str, hint: object) -> object:
    if get_origin(hint) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        value: object = msgspec.convert(text, hint, strict=False)
    except msgspec.ValidationError as error:
        raise Invalid(f"environment variable {variable}={text!r}: {error}") from None
    return value


def _without_secrets(value: object) -> dict[str, object]:
    assert isinstance(value, dict)
    return {
        key: "***"
        if key in SECRET_KEYS and item
        else _without_secrets(item)
        if isinstance(item, dict)
        else item
        for key, item in value.items()
    }
