"""What the CNI specification fixes, 0.3.1 to 1.1.0: versions, commands, error codes, results."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, StrEnum
from typing import Final

import msgspec
from msgspec import Struct

from services.runtime.errors import (
    Conflict,
    Exhausted,
    Invalid,
    NotFound,
    Retry,
    TesseraError,
)

SUPPORTED: Final = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
# What is answered in where the request does not say, or says something unreadable.
NEWEST: Final = SUPPORTED[-1]


class Command(StrEnum):
    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    GC = "GC"
    STATUS = "STATUS"
    VERSION = "VERSION"


# The version of the specification that brought a command; the others have always been there.
SINCE: Final[Mapping[Command, str]] = {
    Command.CHECK: "0.4.0",
    Command.GC: "1.1.0",
    Command.STATUS: "1.1.0",
}


class Code(IntEnum):
    INCOMPATIBLE_VERSION = 1
    UNSUPPORTED_FIELD = 2
    UNKNOWN_CONTAINER = 3
    BAD_ENVIRONMENT = 4
    UNDECODABLE = 6
    BAD_CONFIG = 7
    TRY_AGAIN = 11
    NOT_AVAILABLE = 50
    # From 100 on they are the plugin's own.
    UNUSABLE = 100
    EXHAUSTED = 101
    NOT_AS_ADDED = 102


class CniError(TesseraError):
    """The specification's error result. `str()` is its message, `details` what explains it."""

    def __init__(self, code: Code, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.details = details


_CODES: Final[Mapping[type[TesseraError], Code]] = {
    Retry: Code.TRY_AGAIN,
    Conflict: Code.TRY_AGAIN,
    NotFound: Code.UNKNOWN_CONTAINER,
    Invalid: Code.BAD_CONFIG,
    Exhausted: Code.EXHAUSTED,
}


def as_cni(error: TesseraError) -> CniError:
    """What a runtime is told of any refusal: retry, give up, or ask the administrator."""
    if isinstance(error, CniError):
        return error
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), Code.UNUSABLE)
    return CniError(code, str(error))


class Interface(Struct, frozen=True, omit_defaults=True):
    """`sandbox` empty: on the host. `mtu`: since 1.1.0."""

    name: str
    mac: str = ""
    sandbox: str = ""
    mtu: int = 0


class Ip(Struct, frozen=True, omit_defaults=True):
    """`interface`: index into the result's interfaces. `version`: before 1.0.0, "4" or "6"."""

    address: str
    version: str = ""
    gateway: str = ""
    interface: int | None = None


class Route(Struct, frozen=True, omit_defaults=True):
    dst: str
    gw: str = ""


class Dns(Struct, frozen=True, omit_defaults=True):
    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class Result(Struct, frozen=True):
    cniVersion: str
    interfaces: tuple[Interface, ...] = ()
    ips: tuple[Ip, ...] = ()
    routes: tuple[Route, ...] = ()
    dns: Dns = Dns()


class ErrorResult(Struct, frozen=True, omit_defaults=True):
    cniVersion: str
    code: int
    msg: str
    details: str = ""


class VersionResult(Struct, frozen=True):
    cniVersion: str
    supportedVersions: tuple[str, ...] = SUPPORTED


def encode(result: Result | VersionResult | ErrorResult) -> bytes:
    return msgspec.json.encode(result) + b"\n"


def error_result(error: CniError, version: str) -> ErrorResult:
    return ErrorResult(version, int(error.code), str(error), error.details)


def older(version: str, than: str) -> bool:
    """Both are of SUPPORTED."""
    return SUPPORTED.index(version) < SUPPORTED.index(than)
