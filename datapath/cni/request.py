"""A runtime's request: what it put into the environment and wrote on standard input.

    environment ─┐                      ┌─ refused by the specification's code, with the name of
    stdin ───────┴─► parse ─► Request ──┤  what is wrong
                                        └─ decide.py

The forwarder sends both as one body: NAME=VALUE, each ended by a zero byte, one more zero byte, and
standard input. An environment holds no zero byte, so nothing in it can be mistaken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from datapath.cni.spec import NEWEST, SINCE, SUPPORTED, CniError, Code, Command, Dns, Result, Route
from datapath.links import INTERFACE_NAME

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SEPARATOR: Final = b"\0\0"
_NEEDS: Final[Mapping[Command, tuple[str, ...]]] = {
    Command.ADD: ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    Command.CHECK: ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    Command.DEL: ("CNI_CONTAINERID", "CNI_IFNAME"),
}


class ValidAttachment(Struct, frozen=True):
    containerID: str
    ifname: str


class NetConf(Struct, frozen=True, rename="camel"):
    """The network configuration as the runtime hands it to this plugin. `mtu` 0: the node's.
    `namespace`: of containers that the runtime puts into none. `labels`: of every container.
    `pool`: of addresses; empty: the one that serves the namespace."""

    cni_version: str = ""
    name: str = ""
    type: str = ""
    args: dict[str, Any] = msgspec.field(default_factory=dict)
    runtime_config: dict[str, Any] = msgspec.field(default_factory=dict)
    prev_result: Result | None = None
    dns: Dns = Dns()
    mtu: Annotated[int, Meta(ge=0, le=65535)] = 0
    namespace: str = "default"
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    pool: str = ""
    valid_attachments: tuple[ValidAttachment, ...] | None = msgspec.field(
        default=None, name="cni.dev/valid-attachments"
    )


# Deleting must not fail for a field that adding would refuse: files are edited in between.
_ALWAYS_READ: Final = frozenset({"cniVersion", "name", "type"})
_ALLOWED: Final = frozenset(
    name.encode_name for name in msgspec.structs.fields(NetConf)
) | frozenset({"capabilities", "disableCheck", "disableGC", "cniVersions", "cni.dev/attachments"})


@dataclass(frozen=True, slots=True)
class Request:
    command: Command
    config: NetConf
    container: str = ""
    interface: str = ""
    netns: str = ""
    args: Mapping[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str:
        return self.config.cni_version


def split(body: bytes) -> tuple[dict[str, str], bytes]:
    """The forwarder's body: environment, standard input."""
    head, separator, stdin = body.partition(_SEPARATOR)
    if not separator:
        raise CniError(Code.UNDECODABLE, "the request is not what the tessera plugin sends")
    pairs = (pair.partition("=") for pair in head.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}, stdin


def version_of(stdin: bytes) -> str:
    """The version to answer in, whatever else is wrong with the request."""
    try:
        found = msgspec.json.decode(stdin, type=Asked).cniVersion
    except msgspec.DecodeError:
        return NEWEST
    return found or NEWEST


class Asked(Struct):
    cniVersion: str = ""


def parse(environ: Mapping[str, str], stdin: bytes) -> Request:
    """Raises `CniError`."""
    command = _command(environ)
    if command is Command.VERSION:
        return Request(command, NetConf(cni_version=version_of(stdin)))
    config = _config(command, stdin)
    for name in _NEEDS.get(command, ()):
        if problem := _problem(name, environ.get(name, "")):
            raise CniError(Code.BAD_ENVIRONMENT, f"{name} {problem}")
    return Request(
        command,
        config,
        environ.get("CNI_CONTAINERID", ""),
        environ.get("CNI_IFNAME", ""),
        environ.get("CNI_NETNS", ""),
        {} if command is Command.DEL else _args(environ.get("CNI_ARGS", "")),
    )


def _command(environ: Mapping[str, str]) -> Command:
    given = environ.get("CNI_COMMAND", "")
    try:
        return Command(given)
    except ValueError:
        known = ", ".join(Command)
        raise CniError(Code.BAD_ENVIRONMENT, f"CNI_COMMAND is {given!r}, none of {known}") from None


def _problem(name: str, value: str) -> str:
    if not value:
        return "is not set"
    match name:
        case "CNI_CONTAINERID" if not _NAME.fullmatch(value):
            return f"{value!r} is no container id: letters, digits, _, . and -, no symbol first"
        case "CNI_IFNAME" if not INTERFACE_NAME.fullmatch(value) or value in (".", ".."):
            return f"{value!r} is no interface name: 1 to 15 characters, no space, / or :"
        case "CNI_NETNS" if not value.startswith("/"):
            return f"{value!r} is no absolute path of a network namespace"
        case _:
            return ""


def _args(text: str) -> dict[str, str]:
    """CNI_ARGS: KEY=VALUE;KEY=VALUE."""
    found = {}
    for pair in filter(None, text.split(";")):
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise CniError(Code.BAD_ENVIRONMENT, f"CNI_ARGS: {pair!r} is not KEY=VALUE")
        found[key] = value
    return found


def _config(command: Command, stdin: bytes) -> NetConf:
    try:
        fields = msgspec.json.decode(stdin, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise CniError(
            Code.UNDECODABLE, "the network configuration is no JSON object", str(error)
        ) from None
    _check_version(command, fields.get("cniVersion", "0.1.0"))
    if command is Command.DEL:
        fields = {key: value for key, value in fields.items() if key in _ALWAYS_READ}
    for key, value in fields.items():
        if key not in _ALLOWED:
            shown = msgspec.json.encode(value).decode()
            raise CniError(
                Code.UNSUPPORTED_FIELD,
                f"unsupported field {key}: {shown}",
                "remove it from the tessera plugin's part of the network configuration",
            )
    try:
        config = msgspec.convert(fields, NetConf)
    except msgspec.ValidationError as error:
        raise CniError(Code.BAD_CONFIG, f"network configuration: {error}") from None
    if command is not Command.DEL:
        _check(config)
    return config


def _check_version(command: Command, version: object) -> None:
    if version not in SUPPORTED:
        raise CniError(
            Code.INCOMPATIBLE_VERSION,
            f"cniVersion {version} is not supported",
            f"supported are {', '.join(SUPPORTED)}",
        )
    since = SINCE.get(command, SUPPORTED[0])
    if SUPPORTED.index(version) < SUPPORTED.index(since):
        raise CniError(
            Code.INCOMPATIBLE_VERSION,
            f"cniVersion {version} has no {command}",
            f"{command} came with {since}: raise cniVersion in the network configuration",
        )


def _check(config: NetConf) -> None:
    if not _NAME.fullmatch(config.name):
        raise CniError(
            Code.BAD_CONFIG,
            f"name {config.name!r} is no network name: letters, digits, _, . and -, no symbol "
            "first",
        )
    for route in config.routes:
        try:
            ip_network(route.dst)
        except ValueError as error:
            raise CniError(Code.BAD_CONFIG, f"routes: {route.dst!r} is no CIDR: {error}") from None
        if route.gw:
            raise CniError(
                Code.UNSUPPORTED_FIELD,
                f"unsupported field routes[].gw: {route.gw}",
                "every route of an endpoint goes through the node; leave gw out",
            )
