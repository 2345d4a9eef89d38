"""Several nodes on one control plane: each a network namespace with an agent of its own.

    pods ── veth + programs ── node n1 ──┐
    pods ── veth + programs ── node n2 ──┼── fabric (a bridge, 10.88.0.0/24)
                     world (no node) ────┘

Agents reach the control plane over its unix sockets, the management link of these nodes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

from services.cli import client, layout
from services.runtime.errors import TesseraError
from tests.fakes.netns import Namespace
from tests.fakes.stack import POOL, ControlPlane, Stack, eventually

FABRIC = "10.88.0"
FABRIC6 = "fd88::"
POOL6 = "fd41::/48"
WORLD_HOST = 200
BITS = 24


class Pod:
    def __init__(
        self, ns: Namespace, node: ClusterNode, name: str, made: Mapping[str, Any]
    ) -> None:
        self.ns = ns
        self.node = node
        self.name = name
        self.ip = str(made["ip"])
        self.ip6 = str(made["ip6"])
        self.identity = int(made["identity"])
        self.id = int(made["id"])
        self.outer = str(made["interface"])


class ClusterNode:
    """`ip`: on the fabric."""

    def __init__(self, plane: Stack, fabric: Namespace, number: int, config: Mapping[str, Any]):
        self.name = f"{plane.name}-n{number}"
        self.ip = f"{FABRIC}.{number}"
        self.ip6 = f"{FABRIC6}{number}"
        self.ns = Namespace.create("tsr-node")
        self.dir = plane.dir / f"n{number}"
        self.bpf_dir = plane.bpf_dir.with_name(f"{plane.bpf_dir.name}-n{number}")
        plug(fabric, self.ns, number, self.ip)
        self.layout = layout.Layout(self.dir / "state", self.dir / "run", self.bpf_dir)
        self.agent = client.agent(str(self.layout.socket("agent")))
        tables: Any = tomllib.loads(plane.layout.config_file.read_text())
        tables["agent"] |= {
            "node_name": self.name,
            "node_ip": self.ip,
            "state_dir": str(self.layout.state_dir),
            "run_dir": str(self.layout.run_dir),
            "bpf_dir": str(self.bpf_dir),
            **config,
        }
        self.layout.log_dir.mkdir(parents=True)
        self.config_file = self.dir / "tessera.toml"
        self.config_file.write_text(layout.dump(tables))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("TESSERA_")}
        with (self.layout.log_dir / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *("nsenter", f"--net={self.ns.path}", sys.executable, "-m"),
                    *("datapath.agent.main", "--config", str(self.config_file)),
                ],
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        eventually(self._ready, f"agent {self.name} is not ready: {self.log()}", 60.0)

    def _ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        try:
            status = self.status()
        except TesseraError:
            return False
        return status["policyd"] == status["identityd"] == "connected"

    def kill(self) -> None:
        """SIGKILL, and the end awaited."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def restart(self) -> None:
        self.kill()
        self.start()
        self.wait_ready()

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.agent.get("/v1/status")))

    def log(self) -> str:
        path = self.layout.log_dir / "agent.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else "no log"

    def flows(self, **query: str) -> list[dict[str, Any]]:
        lines = self.agent.get("/v1/events", query).splitlines()
        return [json.loads(line) for line in lines]

    def tessera(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The command, run on this node."""
        environ = {
            **os.environ,
            "TESSERA_AGENT_SOCKET": str(self.layout.socket("agent")),
            "TESSERA_BPF_DIR": str(self.bpf_dir),
        }
        argv = [sys.executable, "-m", "services.cli.main", *words]
        return subprocess.run(
            ["nsenter", f"--net={self.ns.path}", *argv],
            capture_output=True, text=True, env=environ, check=False, timeout=60,
        )  # fmt: skip

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self.bpf_dir, ignore_errors=True)
        self.ns.delete()


def plug(fabric: Namespace, ns: Namespace, number: int, address: str) -> None:
    """A cable from the namespace's eth0 to the bridge."""
    port = f"p{number}"
    subprocess.run(
        f"ip -n {fabric.name} link add {port} type veth peer name eth0 netns {ns.name}".split(),
        check=True,
    )
    fabric.ip(f"link set {port} master br0 up")
    ns.ip(f"addr add {address}/{BITS} dev eth0")
    ns.ip(f"-6 addr add {FABRIC6}{number}/64 dev eth0 nodad")
    ns.ip("link set eth0 up")


class Cluster:
    """`plane` has the doors to the control plane, `world` is on the fabric and no node."""

    def __init__(self, tag: str, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
        Stack.needs()
        self.plane = ControlPlane.start(tag, overrides)
        self._cleanup = ExitStack()
        self._cleanup.callback(self.plane.stop)
        self.fabric = Namespace.create("tsr-fabric")
        self._cleanup.callback(self.fabric.delete)
        self.fabric.ip("link add br0 type bridge")
        self.fabric.ip("link set br0 up")
        self.world = Namespace.create("tsr-world")
        self._cleanup.callback(self.world.delete)
        self.world_ip = f"{FABRIC}.{WORLD_HOST}"
        self.world_ip6 = f"{FABRIC6}{WORLD_HOST}"
        plug(self.fabric, self.world, WORLD_HOST, self.world_ip)
        self.nodes: list[ClusterNode] = []
        self.pods: list[Pod] = []
        self._config = config

    @classmethod
    def start(
        cls,
        tag: str,
        nodes: int = 2,
        config: Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Self:
        """`config`: of every agent."""
        pools = {"ipamd": {"pools": {"default": {"cidrs": [POOL, POOL6]}}}}
        made = cls(tag, config or {}, pools | dict(overrides or {}))
        try:
            for _ in range(nodes):
                made.add_node()
            for node in made.nodes:
                node.wait_ready()
            made.settled()
        except BaseException:
            made.stop()
            raise
        return made

    def add_node(self) -> ClusterNode:
        node = ClusterNode(self.plane, self.fabric, len(self.nodes) + 1, self._config)
        self._cleanup.callback(node.stop)
        self.nodes.append(node)
        node.start()
        return node

    def add_pod(self, node: ClusterNode, name: str, namespace: str = "shop", **labels: str) -> Pod:
        ns = Namespace.create("tsr-pod")
        body = {
            "namespace": namespace,
            "name": name,
            "labels": [f"k8s:{key}={value}" for key, value in labels.items()],
            "netns": ns.name,
        }
        made = node.agent.request("POST", "/v1/endpoints", body=json.dumps(body).encode())
        pod = Pod(ns, node, name, json.loads(made))
        self.pods.append(pod)
        return pod

    def remove_pod(self, pod: Pod) -> None:
        pod.node.agent.request("DELETE", f"/v1/endpoints/{pod.id}")
        pod.ns.delete()
        self.pods.remove(pod)

    def clear_policies(self) -> None:
        for one in json.loads(self.plane.rest.get("/v1/policies"))["policies"]:
            self.plane.withdraw(one["kind"], one.get("namespace", ""), one["name"])

    def settled(self) -> None:
        """Every node knows every other, every pod, and the way to it."""

        def reached() -> bool:
            for node in self.nodes:
                remote = 2 * sum(pod.node is not node for pod in self.pods)
                known = {ip for o in self.nodes if o is not node for ip in (o.ip, o.ip6)}
                if node.status()["routes"]["held"] != remote or not known <= self._known(node):
                    return False
            return True

        eventually(reached, "the nodes do not know each other")

    def _known(self, node: ClusterNode) -> set[str]:
        done = node.tessera("bpf", "ipcache", "list", "-o", "json")
        rows = map(json.loads, done.stdout.splitlines())
        return {row["cidr"] for row in rows}

    def apply(self, *manifests: str) -> int:
        """The revision, once every node has it."""
        return self.plane.apply("\n---\n".join(manifests))

    def stop(self) -> None:
        self._cleanup.close()
        for pod in self.pods:
            pod.ns.delete()
