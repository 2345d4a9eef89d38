"""What of libbpf Tessera needs: open an object, size and pin its maps, load it; clsact filters.

libbpf does the relocation work; everything else is datapath/bpfcall.py. libbpf >= 1.0. A program
the verifier refuses raises Unusable with the one line that says why; the whole log goes to a file.
"""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from services.runtime.errors import Unusable

_Print = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_libc: Final = ctypes.CDLL(None)
_DEBUG: Final = 2
_TC_INGRESS: Final = 1
_TC_EGRESS: Final = 2
_TC_F_REPLACE: Final = 1
# Our filters' place at a hook. Whoever else filters there comes before or after, not instead.
_TC_HANDLE: Final = 1
_TC_PRIORITY: Final = 1


class _TcHook(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("ifindex", ctypes.c_int),
        ("attach_point", ctypes.c_int),
        ("parent", ctypes.c_uint32),
    )


class _TcOpts(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("prog_fd", ctypes.c_int),
        ("flags", ctypes.c_uint32),
        ("prog_id", ctypes.c_uint32),
        ("handle", ctypes.c_uint32),
        ("priority", ctypes.c_uint32),
    )


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    for name, result, arguments in (
        ("libbpf_set_print", pointer, [pointer]),
        ("bpf_object__open_file", pointer, [text, pointer]),
        ("bpf_object__load", ctypes.c_int, [pointer]),
        ("bpf_object__close", None, [pointer]),
        ("bpf_object__next_map", pointer, [pointer, pointer]),
        ("bpf_object__next_program", pointer, [pointer, pointer]),
        ("bpf_map__name", text, [pointer]),
        ("bpf_map__fd", ctypes.c_int, [pointer]),
        ("bpf_map__type", ctypes.c_int, [pointer]),
        ("bpf_map__key_size", ctypes.c_uint32, [pointer]),
        ("bpf_map__value_size", ctypes.c_uint32, [pointer]),
        ("bpf_map__map_flags", ctypes.c_uint32, [pointer]),
        ("bpf_map__max_entries", ctypes.c_uint32, [pointer]),
        ("bpf_map__set_max_entries", ctypes.c_int, [pointer, ctypes.c_uint32]),
        ("bpf_map__set_pin_path", ctypes.c_int, [pointer, text]),
        ("bpf_program__name", text, [pointer]),
        ("bpf_program__fd", ctypes.c_int, [pointer]),
        ("bpf_program__set_autoload", ctypes.c_int, [pointer, ctypes.c_bool]),
        ("bpf_tc_hook_create", ctypes.c_int, [pointer]),
        ("bpf_tc_attach", ctypes.c_int, [pointer, pointer]),
        ("bpf_tc_detach", ctypes.c_int, [pointer, pointer]),
        ("bpf_tc_query", ctypes.c_int, [pointer, pointer]),
    ):
        function = getattr(lib, name)
        function.restype = result
        function.argtypes = arguments
    return lib


def _library() -> ctypes.CDLL:
    try:
        lib = _declare(ctypes.CDLL("libbpf.so.1", use_errno=True))
    except OSError:
        raise Unusable(
            "libbpf.so.1 is missing: install libbpf1 (Debian, Ubuntu) or libbpf"
        ) from None
    lib.libbpf_set_print(ctypes.cast(_printer, ctypes.c_void_p))
    return lib


_listening = threading.local()


def _hear(level: int, template: bytes, arguments: int) -> int:
    said: list[str] | None = getattr(_listening, "said", None)
    if level < _DEBUG and said is not None:
        # A whole verifier log passes here as one message.
        text = ctypes.create_string_buffer(1 << 24 if b"BEGIN" in template else 1 << 12)
        _libc.vsnprintf(text, ctypes.c_size_t(len(text)), template, ctypes.c_void_p(arguments))
        said.append(text.value.decode(errors="replace"))
    return 0


# libbpf keeps one printer per process and calls it in the thread that works; one that came and
# went with each call could be gone while another thread is in it.
_printer: Final = _Print(_hear)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What libbpf says meanwhile in this thread, instead of its writing to stderr."""
    _listening.said = said = list[str]()
    try:
        yield said
    finally:
        _listening.said = None


def verifier_summary(log: str) -> str:
    """The line that says what is wrong: the last before the verifier's statistics."""
    noise = re.compile(
        r"^(processed \d+ insns|verification time|stack depth|-- (BEGIN|END)|libbpf:)"
    )
    lines = [line.strip() for line in log.splitlines()]
    useful = [line for line in lines if line and not noise.match(line)]
    return useful[-1] if useful else "no reason given"


class MapSpec:
    """One map of an opened, not yet loaded object."""

    def __init__(self, lib: ctypes.CDLL, handle: int) -> None:
        self._lib = lib
        self._handle = handle
        self.name: str = lib.bpf_map__name(handle).decode()
        self.type: int = lib.bpf_map__type(handle)
        self.key_size: int = lib.bpf_map__key_size(handle)
        self.value_size: int = lib.bpf_map__value_size(handle)
        self.flags: int = lib.bpf_map__map_flags(handle)

    @property
    def max_entries(self) -> int:
        entries: int = self._lib.bpf_map__max_entries(self._handle)
        return entries

    def resize(self, max_entries: int) -> None:
        self._check(self._lib.bpf_map__set_max_entries(self._handle, max_entries), "resize")

    def pin_at(self, path: Path) -> None:
        """Loading reuses what is pinned at `path`, or pins the new map there."""
        self._check(self._lib.bpf_map__set_pin_path(self._handle, os.fsencode(path)), "pin")

    def _check(self, result: int, what: str) -> None:
        if result:
            raise Unusable(f"cannot {what} BPF map {self.name}: {os.strerror(-result)}")


class BpfObject:
    """A built object file: opened, adjusted, then loaded once."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise Unusable(f"no BPF object at {path}: run `make setup` to build it")
        self._lib = _library()
        self._path = path
        with _heard() as said:
            self._handle = self._lib.bpf_object__open_file(os.fsencode(path), None)
        if not self._handle:
            raise Unusable(f"{path} is not a BPF object: {' '.join(said).strip()}")
        self.maps = {spec.name: spec for spec in self._each_map()}

    def _each_map(self) -> Iterator[MapSpec]:
        handle = self._lib.bpf_object__next_map(self._handle, None)
        while handle:
            spec = MapSpec(self._lib, handle)
            if "." not in spec.name:  # .rodata and the like belong to the compiler
                yield spec
            handle = self._lib.bpf_object__next_map(self._handle, handle)

    def load(
        self, log_dir: Path | None = None, wanted: Collection[str] | None = None
    ) -> dict[str, int]:
        """Program descriptors by name, valid until `close`. `wanted`: not all, but these."""
        programs = {
            name: handle
            for name, handle in self._each_program()
            if wanted is None or name in wanted
        }
        for name, handle in self._each_program():
            self._lib.bpf_program__set_autoload(handle, name in programs)
        with _heard() as said:
            result = self._lib.bpf_object__load(self._handle)
        if result:
            raise self._refused(-result, "".join(said), log_dir)
        return {name: self._lib.bpf_program__fd(handle) for name, handle in programs.items()}

    def _each_program(self) -> Iterator[tuple[str, int]]:
        handle = self._lib.bpf_object__next_program(self._handle, None)
        while handle:
            yield self._lib.bpf_program__name(handle).decode(), handle
            handle = self._lib.bpf_object__next_program(self._handle, handle)

    def _refused(self, code: int, log: str, log_dir: Path | None) -> Unusable:
        reason = os.strerror(code)
        if "BEGIN PROG LOAD LOG" in log:
            with tempfile.NamedTemporaryFile(
                "w", prefix="tessera-verifier-", suffix=".log", dir=log_dir, delete=False
            ) as file:
                file.write(log)
            return Unusable(
                f"the kernel refuses the programs of {self._path}: {verifier_summary(log)} "
                f"(whole log: {file.name})"
            )
        said = next((line for line in reversed(log.splitlines()) if line), "")
        return Unusable(f"cannot load {self._path}: {reason}: {said}")

    def close(self) -> None:
        if self._handle:
            self._lib.bpf_object__close(self._handle)
            self._handle = None


class Clsact:
    """Filters on the clsact qdisc: quick to attach, and all there is before kernel 6.6."""

    def __init__(self) -> None:
        self._lib = _library()

    @staticmethod
    def _hook(ifindex: int, point: int) -> _TcHook:
        return _TcHook(ctypes.sizeof(_TcHook), ifindex, point, 0)

    def attach(self, ifindex: int, program: int, *, ingress: bool) -> None:
        """Makes the qdisc where it is missing. Replaces our own earlier filter in one step."""
        hook = self._hook(ifindex, _TC_INGRESS if ingress else _TC_EGRESS)
        options = _TcOpts(
            ctypes.sizeof(_TcOpts), program, _TC_F_REPLACE, 0, _TC_HANDLE, _TC_PRIORITY
        )
        with _heard():
            self._lib.bpf_tc_hook_create(ctypes.byref(hook))  # EEXIST: somebody made it before
            result = self._lib.bpf_tc_attach(ctypes.byref(hook), ctypes.byref(options))
        if result:
            raise OSError(-result, os.strerror(-result))

    def detach(self, ifindex: int, *, ingress: bool) -> None:
        hook = self._hook(ifindex, _TC_INGRESS if ingress else _TC_EGRESS)
        options = _TcOpts(ctypes.sizeof(_TcOpts), 0, 0, 0, _TC_HANDLE, _TC_PRIORITY)
        with _heard():
            self._lib.bpf_tc_detach(ctypes.byref(hook), ctypes.byref(options))

    def program_id(self, ifindex: int, *, ingress: bool) -> int:
        """Of our filter; 0: there is none."""
        hook = self._hook(ifindex, _TC_INGRESS if ingress else _TC_EGRESS)
        options = _TcOpts(ctypes.sizeof(_TcOpts), 0, 0, 0, _TC_HANDLE, _TC_PRIORITY)
        with _heard():
            result = self._lib.bpf_tc_query(ctypes.byref(hook), ctypes.byref(options))
        found: int = options.prog_id
        return 0 if result else found
