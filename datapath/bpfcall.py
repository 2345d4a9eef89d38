"""The bpf(2) system call: maps, pins, links and test runs, without a library.

Owns the packing of `union bpf_attr` (include/uapi/linux/bpf.h). Every function raises OSError with
the kernel's errno; callers turn those that mean something to a user into Tessera's errors. The
interpreter lock is released during the call.
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from struct import Struct, pack, unpack_from
from typing import Final

_SYS_BPF: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_libc: Final = ctypes.CDLL(None, use_errno=True)

MAP_LOOKUP_ELEM: Final = 1
MAP_UPDATE_ELEM: Final = 2
MAP_DELETE_ELEM: Final = 3
MAP_GET_NEXT_KEY: Final = 4
OBJ_PIN: Final = 6
OBJ_GET: Final = 7
PROG_TEST_RUN: Final = 10
PROG_GET_FD_BY_ID: Final = 13
OBJ_GET_INFO_BY_FD: Final = 15
MAP_LOOKUP_BATCH: Final = 24
MAP_UPDATE_BATCH: Final = 26
MAP_DELETE_BATCH: Final = 27
LINK_CREATE: Final = 28
LINK_UPDATE: Final = 29
LINK_DETACH: Final = 34

TCX_INGRESS: Final = 46
TCX_EGRESS: Final = 47

_ELEM = Struct("=I4xQQQ")  # map_fd, key, value or next_key, flags
_BATCH = Struct("=QQQQIIQQ")  # in, out, keys, values, count, map_fd, elem_flags, flags


def _bpf(command: int, attr: ctypes.Array[ctypes.c_char]) -> int:
    result: int = _libc.syscall(
        ctypes.c_long(_SYS_BPF[platform.machine()]),
        ctypes.c_int(command),
        attr,
        ctypes.c_uint(len(attr)),
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _attr(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, len(data))


def _address(data: bytes | ctypes.Array[ctypes.c_char]) -> int:
    """Where `data` lives; the caller keeps it alive across the call."""
    if isinstance(data, bytes):
        return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
    return ctypes.addressof(data)


def map_lookup(fd: int, key: bytes, value_size: int) -> bytes:
    value = ctypes.create_string_buffer(value_size)
    _bpf(MAP_LOOKUP_ELEM, _attr(_ELEM.pack(fd, _address(key), _address(value), 0)))
    return value.raw


def map_update(fd: int, key: bytes, value: bytes) -> None:
    _bpf(MAP_UPDATE_ELEM, _attr(_ELEM.pack(fd, _address(key), _address(value), 0)))


def map_delete(fd: int, key: bytes) -> None:
    _bpf(MAP_DELETE_ELEM, _attr(_ELEM.pack(fd, _address(key), 0, 0)))


def map_next_key(fd: int, key: bytes | None, key_size: int) -> bytes:
    following = ctypes.create_string_buffer(key_size)
    at = 0 if key is None else _address(key)
    _bpf(MAP_GET_NEXT_KEY, _attr(_ELEM.pack(fd, at, _address(following), 0)))
    return following.raw


class BatchError(OSError):
    """A batch stopped; `done` rows before the culprit were carried out."""

    def __init__(self, code: int, done: int) -> None:
        super().__init__(code, os.strerror(code))
        self.done = done


def _batch(command: int, fd: int, keys: bytes, values: bytes, count: int) -> None:
    values_at = _address(values) if values else 0
    attr = _attr(_BATCH.pack(0, 0, _address(keys), values_at, count, fd, 0, 0))
    try:
        _bpf(command, attr)
    except OSError as error:
        # The kernel overwrites `count` with the rows done, but only once it has started.
        (done,) = unpack_from("=I", attr.raw, 32)
        raise BatchError(error.errno or 0, done if done < count else 0) from error


def map_update_batch(fd: int, keys: bytes, values: bytes, count: int) -> None:
    _batch(MAP_UPDATE_BATCH, fd, keys, values, count)


def map_delete_batch(fd: int, keys: bytes, count: int) -> None:
    _batch(MAP_DELETE_BATCH, fd, keys, b"", count)


@dataclass(frozen=True, slots=True)
class Page:
    """One answer of MAP_LOOKUP_BATCH; `cursor` continues, None: that was the last."""

    keys: bytes
    values: bytes
    count: int
    cursor: bytes | None


def map_lookup_batch(
    fd: int, cursor: bytes | None, count: int, key_size: int, value_size: int
) -> Page:
    keys = ctypes.create_string_buffer(count * key_size)
    values = ctypes.create_string_buffer(count * value_size)
    following = ctypes.create_string_buffer(max(4, key_size))
    start = 0 if cursor is None else _address(cursor)
    attr = _attr(
        _BATCH.pack(start, _address(following), _address(keys), _address(values), count, fd, 0, 0)
    )
    last = False
    try:
        _bpf(MAP_LOOKUP_BATCH, attr)
    except FileNotFoundError:  # ENOENT: the end was reached, with `count` rows in this page
        last = True
    (got,) = unpack_from("=I", attr.raw, 32)
    return Page(
        keys.raw[: got * key_size],
        values.raw[: got * value_size],
        got,
        None if last else following.raw,
    )


def pin(fd: int, path: Path) -> None:
    name = os.fsencode(path) + b"\0"
    _bpf(OBJ_PIN, _attr(pack("=QII", _address(name), fd, 0)))


def get_pinned(path: Path) -> int:
    name = os.fsencode(path) + b"\0"
    return _bpf(OBJ_GET, _attr(pack("=QII", _address(name), 0, 0)))


def _info(fd: int, info: ctypes.Array[ctypes.c_char]) -> None:
    _bpf(OBJ_GET_INFO_BY_FD, _attr(pack("=IIQ", fd, len(info), _address(info))))


@dataclass(frozen=True, slots=True)
class MapInfo:
    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


def map_info(fd: int) -> MapInfo:
    info = ctypes.create_string_buffer(88)
    _info(fd, info)
    return MapInfo(*unpack_from("=6I", info.raw))


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    id: int
    tag: bytes
    map_ids: frozenset[int]


def program_info(fd: int) -> ProgramInfo:
    room = 64
    maps = ctypes.create_string_buffer(4 * room)
    # struct bpf_prog_info: nr_map_ids at 52, map_ids at 56.
    info = ctypes.create_string_buffer(bytes(52) + pack("=IQ", room, _address(maps)), 232)
    _info(fd, info)
    ident, tag = unpack_from("=4xI8s", info.raw)
    (count,) = unpack_from("=I", info.raw, 52)
    return ProgramInfo(ident, tag, frozenset(unpack_from(f"={min(count, room)}I", maps.raw)))


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """Of a tcx link; `ifindex` 0: its interface is gone."""

    id: int
    program_id: int
    ifindex: int


def link_info(fd: int) -> LinkInfo:
    info = ctypes.create_string_buffer(64)
    _info(fd, info)
    return LinkInfo(*unpack_from("=4xII4xI", info.raw))


def program_by_id(ident: int) -> int:
    return _bpf(PROG_GET_FD_BY_ID, _attr(pack("=III", ident, 0, 0)))


def tcx_attach(program: int, ifindex: int, attach_type: int) -> int:
    """The link's descriptor; the link goes with its last descriptor or pin."""
    attr = pack("=IIII", program, ifindex, attach_type, 0) + bytes(32)
    return _bpf(LINK_CREATE, _attr(attr))


def link_detach(link: int) -> None:
    """At once; giving up the last pin does it some time later."""
    _bpf(LINK_DETACH, _attr(pack("=I", link)))


def link_update(link: int, program: int) -> None:
    _bpf(LINK_UPDATE, _attr(pack("=IIII", link, program, 0, 0)))


_CONTEXT: Final = 192  # bytes of struct __sk_buff; `mark` is its third word


@dataclass(frozen=True, slots=True)
class RunResult:
    result: int
    packet: bytes
    mark: int
    duration_ns: int


def run_program(program: int, packet: bytes, *, context: bytes = b"", repeat: int = 1) -> RunResult:
    """Runs a tc program on `packet`; `context`: the head of a struct __sk_buff.

    `duration_ns` is the kernel's average per run.
    """
    out = ctypes.create_string_buffer(len(packet) + 256)
    after = ctypes.create_string_buffer(_CONTEXT)
    context = context.ljust(_CONTEXT, b"\0")
    attr = _attr(
        pack(
            "=IIIIQQIIIIQQ",
            program,
            0,
            len(packet),
            len(out),
            _address(packet),
            _address(out),
            repeat,
            0,
            len(context),
            len(after),
            _address(context),
            _address(after),
        )
        + bytes(16)
    )
    _bpf(PROG_TEST_RUN, attr)
    result, _, size = unpack_from("=III", attr.raw, 4)
    (duration,) = unpack_from("=I", attr.raw, 36)
    (mark,) = unpack_from("=I", after.raw, 8)
    return RunResult(result, out.raw[:size], mark, duration)
