"""A real etcd as a child process, for one machine and for tests.

The child has its own session, so a Ctrl-C in the terminal reaches Tessera alone and etcd is
stopped in order. A child that outlived its parent is named by its pid file, never killed unasked.
Logs go to `<data_dir>.log`, the pid to `<data_dir>.pid`.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

from services.runtime.clock import Clock, SystemClock
from services.runtime.errors import Unusable
from services.runtime.log import logger

log = logger(__name__)

START_DEADLINE_S: Final = 20.0
STOP_DEADLINE_S: Final = 10.0
POLL_S: Final = 0.05

# Wider than etcd's defaults, for other clients; Tessera's own requests stay within the defaults.
MAX_TXN_OPS: Final = 1024
MAX_REQUEST_BYTES: Final = 8 * 1024 * 1024
# Longer than any watcher is expected to be away; a longer absence relists.
COMPACTION_RETENTION: Final = "30m"
QUOTA_BYTES: Final = 4 * 1024**3


class EmbeddedEtcd:
    """Port 0 picks a free one. `data_dir` may hold the data of an earlier run. `extra_arguments`
    come last, so they override."""

    def __init__(
        self,
        data_dir: Path,
        client_port: int = 0,
        peer_port: int = 0,
        *,
        extra_arguments: tuple[str, ...] = (),
        clock: Clock | None = None,
    ) -> None:
        self._data_dir = data_dir
        free = _free_ports(3)
        self._ports = (client_port or free[0], peer_port or free[1], free[2])
        self._extra = extra_arguments
        self._clock: Clock = clock or SystemClock()
        self._process: asyncio.subprocess.Process | None = None

    @property
    def endpoint(self) -> str:
        """host:port for clients."""
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def log_file(self) -> Path:
        return self._data_dir.with_name(self._data_dir.name + ".log")

    @property
    def pid_file(self) -> Path:
        return self._data_dir.with_name(self._data_dir.name + ".pid")

    async def start(self) -> None:
        """Returns when etcd answers. Raises `Unusable` with etcd's last words when it does not."""
        binary = shutil.which("etcd")
        if binary is None:
            raise Unusable("no etcd on PATH; install etcd-server or point etcd.endpoints elsewhere")
        self._refuse_second()
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Unusable(f"etcd's data directory {self._data_dir}: {error.strerror}") from None
        with self.log_file.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                binary,
                *self._arguments(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid_file.write_text(f"{self._process.pid}\n")
        try:
            await self._until_healthy(self._process)
        except BaseException:
            await self.stop()
            raise
        log.info("etcd.started", server=self.endpoint, pid=self._process.pid)

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL when it takes too long. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            # A stopped (SIGSTOP) process would keep the signal pending.
            process.send_signal(signal.SIGCONT)
            try:
                async with asyncio.timeout(STOP_DEADLINE_S):
                    await process.wait()
            except TimeoutError:
                log.warning("etcd.killed", pid=process.pid, reason="did not stop in time")
            finally:
                if process.returncode is None:
                    process.kill()
            await process.wait()
        self.pid_file.unlink(missing_ok=True)

    async def wait(self) -> None:
        """Returns when etcd has ended by itself; the caller decides what that means."""
        if self._process is not None:
            await self._process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()

    def last_words(self) -> str:
        """The last line of etcd's log."""
        try:
            lines = self.log_file.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    def _arguments(self) -> tuple[str, ...]:
        client, peer, health = (f"http://127.0.0.1:{port}" for port in self._ports)
        return (
            "--name=tessera",
            f"--data-dir={self._data_dir}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=tessera={peer}",
            f"--listen-metrics-urls={health}",
            f"--max-txn-ops={MAX_TXN_OPS}",
            f"--max-request-bytes={MAX_REQUEST_BYTES}",
            f"--quota-backend-bytes={QUOTA_BYTES}",
            "--auto-compaction-mode=periodic",
            f"--auto-compaction-retention={COMPACTION_RETENTION}",
            "--logger=zap",
            "--log-outputs=stderr",
            "--log-level=warn",
            *self._extra,
        )

    def _refuse_second(self) -> None:
        """A second etcd would wait for the lock on the data without a word."""
        try:
            pid = int(self.pid_file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (OSError, ValueError):
            return
        if f"--data-dir={self._data_dir}".encode() in command.split(b"\0"):
            raise Unusable(f"etcd (pid {pid}) still runs on {self._data_dir}; stop it: kill {pid}")

    async def _until_healthy(self, process: asyncio.subprocess.Process) -> None:
        deadline_s = self._clock.monotonic_s() + START_DEADLINE_S
        while process.returncode is None:
            if await _healthy(self._ports[2]):
                return
            if self._clock.monotonic_s() > deadline_s:
                raise Unusable(
                    f"etcd on {self._data_dir} is not healthy after {START_DEADLINE_S:.0f} s:"
                    f" {self.last_words() or 'it said nothing'}"
                )
            await self._clock.sleep(POLL_S)
        raise Unusable(
            f"etcd on {self._data_dir} ended with status {process.returncode}:"
            f" {self.last_words() or 'it said nothing'}"
        )


async def _healthy(port: int) -> bool:
    try:
        async with asyncio.timeout(1.0):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"GET /health HTTP/1.0\r\n\r\n")
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return b" 200 " in answer.split(b"\r\n", 1)[0]


def _free_ports(count: int) -> list[int]:
    """Distinct, because all are held until the last is known."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
