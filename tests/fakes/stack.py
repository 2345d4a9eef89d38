"""A whole node for tests: etcd and the five processes, each one killable by name.

Everything it uses is its own: folders, ports, bpffs folder, address pool. `stop` takes it all away.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc
import pytest
from tessera_wire.identity.v1 import identity_pb2 as pb
from tessera_wire.identity.v1 import identity_pb2_grpc

from services.cli import client, layout
from services.runtime.errors import TesseraError
from tests.fakes.etcd import HAVE_ETCD, NO_ETCD
from tests.fakes.kernel_node import built_object, needs_kernel
from tests.fakes.netns import Namespace

T = TypeVar("T")
DEADLINE_S = 30.0
POOL = "10.241.0.0/16"


def eventually(check: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """The first truthy answer of `check`; fails with `what` at the deadline."""
    end = time.perf_counter() + deadline_s
    while not (found := check()):
        assert time.perf_counter() < end, f"after {deadline_s:g} s: {what}"
        time.sleep(0.005)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stack:
    runs: Sequence[str] = layout.PROCESSES

    def __init__(self, tag: str) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix=f"tsr-{tag}-"))
        # Interfaces are named after the node, and other tests of this machine have nodes, too.
        self.name = f"{tag}-{os.getpid()}"
        self.bpf_dir = Path(f"/sys/fs/bpf/tsr-sys-{os.getpid()}-{tag}")
        self.layout = layout.Layout(self.dir / "state", self.dir / "run", self.bpf_dir)
        # Of the machine before this node was on it.
        self.foreign_links = frozenset(name for _, name in socket.if_nameindex())
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.etcd_port = free_port()
        self._peer_port = free_port()
        self.rest = client.server(f"unix://{self.layout.socket('apid')}")
        self.agent = client.agent(str(self.layout.socket("agent")))

    @classmethod
    def start(cls, tag: str, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Self:
        if not HAVE_ETCD:
            pytest.skip(NO_ETCD)
        cls.needs()
        made = cls(tag)
        try:
            made._boot(overrides or {})
        except BaseException:
            made.stop()
            raise
        return made

    @staticmethod
    def needs() -> None:
        """Skips where it cannot run."""
        needs_kernel()
        built_object()

    def _boot(self, overrides: Mapping[str, Mapping[str, Any]]) -> None:
        for folder in (self.layout.state_dir, self.layout.run_dir, self.layout.log_dir):
            folder.mkdir(parents=True, exist_ok=True)
        user: Any = {
            "apid": {"listen": f"unix://{self.layout.socket('apid')}"},
            "ipamd": {"pools": {"default": {"cidrs": [POOL]}}, "metrics_listen": ""},
            "identityd": {"metrics_listen": ""},
            "policyd": {"metrics_listen": ""},
            "agent": {"metrics_listen": "", "node_name": self.name, "node_ip": "127.0.0.1"},
        }
        for section, values in overrides.items():
            user.setdefault(section, {}).update(values)
        if not user["apid"]["listen"].startswith("unix:"):
            self.rest = client.server(f"http://{user['apid']['listen']}")
        tables = layout.node_config(user, self.layout, (f"127.0.0.1:{self.etcd_port}",))
        self.layout.config_file.write_text(layout.dump(tables))
        self.start_etcd()
        for name in self.runs:
            self.start_process(name)
        self.wait_ready()

    # -------------------------------------------------------------- processes

    def start_etcd(self, extra: Mapping[str, str] | None = None) -> None:
        client_url = f"http://127.0.0.1:{self.etcd_port}"
        peer_url = f"http://127.0.0.1:{self._peer_port}"
        options = {
            "data-dir": str(self.layout.etcd_data),
            "max-txn-ops": "1024",
            "listen-client-urls": client_url,
            "advertise-client-urls": client_url,
            "listen-peer-urls": peer_url,
            "initial-advertise-peer-urls": peer_url,
            "initial-cluster": f"default={peer_url}",
            **(extra or {}),
        }
        self._spawn("etcd", ["etcd", *(f"--{key}={value}" for key, value in options.items())])

        def listening() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.etcd_port)) == 0

        eventually(listening, "etcd does not listen")

    def start_process(self, name: str) -> None:
        module = layout.MODULES[name]
        self._spawn(name, [sys.executable, "-m", module, "--config", str(self.layout.config_file)])

    def _spawn(self, name: str, command: list[str]) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("TESSERA_")}
        with (self.layout.log_dir / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=environ, start_new_session=True
            )

    def wait_ready(self) -> None:
        def ready() -> bool:
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended: {self.log(name)}"
            try:
                return self.answers()
            except TesseraError:
                return False

        eventually(ready, "the node is not ready", 60.0)

    def answers(self) -> bool:
        status = json.loads(self.agent.get("/v1/status"))
        return bool(self.node()["connected"] and status["identityd"] == "connected")

    def signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].send_signal(number)

    def kill(self, name: str) -> None:
        """SIGKILL, and the end awaited."""
        process = self.processes.pop(name)
        process.kill()
        process.wait(10)

    def stop(self) -> None:
        try:
            if {"agent", "apid", "etcd"} <= self.processes.keys():
                for endpoint in self.endpoints():
                    self.agent.exchange("DELETE", f"/v1/endpoints/{endpoint['id']}")
        except TesseraError:
            pass  # a test may have left the node half dead; what follows needs nobody's answer
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        shutil.rmtree(self.bpf_dir, ignore_errors=True)
        shutil.rmtree(self.dir, ignore_errors=True)

    def log(self, name: str) -> str:
        return (self.layout.log_dir / f"{name}.log").read_text(errors="replace")[-4000:]

    # -------------------------------------------------------------- doors

    def node(self) -> dict[str, Any]:
        """What policyd says of this node; `connected` False while it says nothing."""
        nodes = json.loads(self.rest.get("/v1/nodes"))["nodes"]
        return next((n for n in nodes if n["node"] == self.name), {"connected": False})

    def endpoints(self) -> list[dict[str, Any]]:
        return json.loads(self.agent.get("/v1/endpoints"))["endpoints"]

    def add(self, ns: Namespace, name: str, namespace: str = "shop", **labels: str) -> str:
        """Creates the endpoint; its address."""
        body = {
            "namespace": namespace,
            "name": name,
            "labels": [f"k8s:{key}={value}" for key, value in labels.items()],
            "netns": ns.name,
            "interface": "eth0",
        }
        made = self.agent.request("POST", "/v1/endpoints", body=json.dumps(body).encode())
        return str(json.loads(made)["ip"])

    def remove(self, name: str, namespace: str = "shop") -> None:
        self.agent.request("DELETE", f"/v1/endpoints/{namespace}/{name}")

    def apply(self, manifest: str, *, wait: bool = True) -> int:
        """The revision; with `wait`, once the node has realised it."""
        reply = self.rest.request("POST", "/v1/policies", {"source": "test"}, manifest.encode())
        revision = int(json.loads(reply)["revision"])
        if wait and revision:
            self.realised(revision)
        return revision

    def withdraw(self, kind: str, namespace: str, name: str) -> None:
        reply = self.rest.request("DELETE", f"/v1/policies/{kind}/{namespace or '_'}/{name}")
        self.realised(int(json.loads(reply)["revision"]))

    def realised(self, revision: int) -> None:
        query = {"revision": revision, "timeout_s": 10}
        answer = json.loads(self.rest.get("/v1/policies/wait", query))
        assert answer["done"], answer

    def flows(self, **query: str) -> list[dict[str, Any]]:
        lines = self.agent.get("/v1/events", query).splitlines()
        return [json.loads(line) for line in lines]

    def allocate(self, label_sets: list[list[str]]) -> list[int]:
        """Identities without endpoints, left to the collector by a node that went at once."""
        with grpc.insecure_channel(f"unix://{self.layout.socket('identityd')}") as channel:
            stub = identity_pb2_grpc.IdentityServiceStub(channel)
            session = stub.OpenSession(pb.OpenSessionRequest(node="elsewhere", ttl_s=300))
            items = [pb.AllocateItem(labels=pb.LabelSet(labels=one)) for one in label_sets]
            request = pb.AllocateRequest(node="elsewhere", lease=session.lease, items=items)
            found = [result.identity for result in stub.Allocate(request, timeout=30).results]
            stub.CloseSession(pb.CloseSessionRequest(node="elsewhere", lease=session.lease))
            return found

    def etcd_keys(self, prefix: str = "") -> list[str]:
        """Straight from etcd's JSON gateway, past our own client."""
        key = base64.b64encode(prefix.encode() or b"\0").decode()
        end = prefix.encode()[:-1] + bytes([prefix.encode()[-1] + 1]) if prefix else b"\0"
        body = {"key": key, "range_end": base64.b64encode(end).decode(), "keys_only": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.etcd_port}/v3/kv/range", json.dumps(body).encode()
        )
        with urllib.request.urlopen(request, timeout=5) as reply:
            found = json.load(reply).get("kvs", [])
        return [base64.b64decode(kv["key"]).decode() for kv in found]


class ControlPlane(Stack):
    """Without an agent: needs neither a kernel nor root."""

    runs = (*layout.SERVICES, "apid")

    @staticmethod
    def needs() -> None: ...

    def answers(self) -> bool:
        services = json.loads(self.rest.get("/v1/status"))["services"]
        return set(services.values()) == {"ok"}
