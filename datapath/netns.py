"""Network namespaces by name or path, and running code inside one."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from services.runtime.errors import Invalid, NotFound

_NETNS_DIR: Final = Path("/run/netns")
_CLONE_NEWNET: Final = 0x40000000
_NS_GET_NSTYPE: Final = 0xB703  # ioctl_ns(2)

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
    """False when there is nothing there. Invalid: what is there cannot be an endpoint's."""
    path = netns_path(netns)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Invalid(f"network namespace {path} cannot be opened: {error.strerror}") from None
    try:
        _refuse_other(path, fd)
    finally:
        os.close(fd)
    return True


def _refuse_other(path: Path, fd: int) -> None:
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError:  # ENOTTY: no namespace at all
        kind = 0
    if kind != _CLONE_NEWNET:
        raise Invalid(
            f"{path} is no network namespace: make one with `ip netns add NAME`, or give the "
            "path of one, such as /proc/PID/ns/net"
        )
    if os.path.samestat(os.fstat(fd), os.stat("/proc/self/ns/net")):
        raise Invalid(f"{path} is the host's own network namespace; an endpoint needs its own")


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
