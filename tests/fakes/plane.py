"""A control plane of several processes each, without a kernel: etcd members, identityds, policyds,
and fleets of simulated nodes; every process can be killed, stopped and started again by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any, Self

import pytest

from services.cli import layout
from tests.fakes.stack import eventually, free_port


class FleetProcess:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, *words: object) -> Any:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(" ".join(map(str, words)) + "\n")
        stdin.flush()
        line = stdout.readline()
        assert line, "the fleet ended; see its log"
        return json.loads(line)


class Plane:
    def __init__(
        self, tag: str, *, etcds: int, identityds: int, policyds: int, policyd: str = ""
    ) -> None:
        """`policyd`: the module to run in its place."""
        self._modules = dict(layout.MODULES) | ({"policyd": policyd} if policyd else {})
        self.dir = Path(tempfile.mkdtemp(prefix=f"tsr-{tag}-"))
        self.processes: dict[str, subprocess.Popen[Any]] = {}
        self.fleets: dict[str, FleetProcess] = {}
        self._commands: dict[str, list[str]] = {}
        self._environ: dict[str, dict[str, str]] = {}
        self._etcd = {f"etcd{n}": (free_port(), free_port()) for n in range(etcds)}
        self._ports = {f"identityd{n}": free_port() for n in range(identityds)}
        self._ports |= {f"policyd{n}": free_port() for n in range(policyds)}

    @classmethod
    def start(
        cls,
        tag: str,
        *,
        etcds: int = 1,
        identityds: int = 1,
        policyds: int = 1,
        policyd: str = "",
    ) -> Self:
        if shutil.which("etcd") is None:
            pytest.skip("no etcd binary on PATH (Debian: etcd-server)")
        made = cls(tag, etcds=etcds, identityds=identityds, policyds=policyds, policyd=policyd)
        try:
            made._boot()
        except BaseException:
            made.stop()
            raise
        return made

    @property
    def etcd(self) -> list[str]:
        return [f"127.0.0.1:{client}" for client, _ in self._etcd.values()]

    def target(self, name: str) -> str:
        return f"127.0.0.1:{self._ports[name]}"

    def all_of(self, kind: str) -> list[str]:
        return [name for name in (*self._etcd, *self._ports, *self.fleets) if name.startswith(kind)]

    def _boot(self) -> None:
        cluster = ",".join(f"{n}=http://127.0.0.1:{p}" for n, (_, p) in self._etcd.items())
        for name, (client, peer) in self._etcd.items():
            urls = {"client": f"http://127.0.0.1:{client}", "peer": f"http://127.0.0.1:{peer}"}
            self._commands[name] = [
                "etcd",
                f"--name={name}",
                f"--data-dir={self.dir / name}",
                f"--listen-client-urls={urls['client']}",
                f"--advertise-client-urls={urls['client']}",
                f"--listen-peer-urls={urls['peer']}",
                f"--initial-advertise-peer-urls={urls['peer']}",
                f"--initial-cluster={cluster}",
                "--log-level=error",
            ]
        for name in self._ports:
            kind = name.rstrip("0123456789")
            config = self._config(name, {kind: {"listen": self.target(name), "metrics_listen": ""}})
            self._commands[name] = [sys.executable, "-m", self._modules[kind], "--config", config]
        for name in self._commands:
            self.run(name)
        for name, (client, _) in self._etcd.items():
            eventually(lambda port=client: listens(port), f"{name} does not listen")
        for name, port in self._ports.items():
            eventually(lambda port=port: listens(port), f"{name}: {self.log(name)}", 60.0)

    def _config(self, name: str, tables: dict[str, dict[str, Any]]) -> str:
        file = self.dir / f"{name}.toml"
        file.write_text(layout.dump({"etcd": {"endpoints": self.etcd}, **tables}))
        return str(file)

    def fleet(
        self, name: str, count: int, *, first: int = 0, preset: bool = False, **plan: int
    ) -> FleetProcess:
        """Called `name`, which begins with "fleet". `preset`: see tests/fakes/fleet.py."""
        self._environ[name] = {"TESTS_PRESET": "1"} if preset else {}
        identityds = ",".join(self.target(n) for n in self.all_of("identityd"))
        agent = {
            "identityd": f"ipv4:{identityds}" if identityds else "127.0.0.1:9",
            "policyd": ",".join(self.target(n) for n in self.all_of("policyd")),
        }
        numbers = {"count": count, "first": first, **plan}
        self._commands[name] = [
            sys.executable,
            "-m",
            "tests.fakes.fleet",
            "--config",
            self._config(name, {"agent": agent}),
            *(text for key, value in numbers.items() for text in (f"--{key}", str(value))),
        ]
        self.run(name)
        return self.fleets[name]

    def run(self, name: str) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("TESSERA_")}
        command = self._commands[name]
        with (self.dir / f"{name}.log").open("ab") as log:
            fleet = name.startswith("fleet")
            pipe: int | IO[bytes] = subprocess.PIPE if fleet else log
            self.processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if fleet else subprocess.DEVNULL,
                stdout=pipe,
                stderr=log,
                env=environ | self._environ.get(name, {}),
                start_new_session=True,
                text=True,
            )
        if fleet:
            self.fleets[name] = FleetProcess(self.processes[name])

    def kill(self, name: str) -> None:
        process = self.processes[name]
        process.kill()
        _ended(process)

    def signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].send_signal(number)

    def log(self, name: str) -> str:
        return (self.dir / f"{name}.log").read_text(errors="replace")[-3000:]

    def stop(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
        for process in self.processes.values():
            _ended(process)
        shutil.rmtree(self.dir, ignore_errors=True)


def _ended(process: subprocess.Popen[Any]) -> None:
    process.wait(10)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
