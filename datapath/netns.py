"""Network namespaces by name or path, and running code inside one."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from services.runtime.errors import NotFound

_NETNS_DIR: Final = Path("/run/netns")
_CLONE_NEWNET: Final = 0x40000000

_T = TypeVar("_T")


def netns_path(netns: str) -> Path:
    """`netns`: a name of `ip netns`, or an absolute path such as /proc/PID/ns/net."""
    return Path(netns) if netns.startswith("/") else _NETNS_DIR / netns


def open_netns(netns: str) -> int:
    path = netns_path(netns)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(
            f"no network namespace {netns} ({path}: {error.strerror}): make it first "
            f"(ip netns add NAME) or give its path"
        ) from None


def netns_exists(netns: str) -> bool:
    return netns_path(netns).exists()


def run_in(netns_fd: int, work: Callable[[], _T]) -> _T:
    """Runs `work` in a thread of its own that has joined the namespace.

    A thread that changed its namespace is never given back to a pool: if leaving failed, its next
    user would work in the wrong one.
    """

    def enter() -> _T:
        _setns(netns_fd)
        return work()

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="netns") as once:
        return once.submit(enter).result()


def _setns(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"cannot enter the network namespace: {os.strerror(code)}")
