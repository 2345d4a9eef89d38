"""A container's interface by CNI, from the runtime's exec of the plugin until its answer.

    tessera     exec of the plugin ──► agent: identity, address, policy in force, carrier
    bridge      exec of bridge, which execs host-local: an address and a carrier, no policy

Both are run as a runtime runs them, in turns, in namespaces of their own; ours is up and judged
when ADD returns. The third row is VERSION, answered by the agent: what the plugin's own start and
the way to the agent and back take of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from tests.bench import figures
from tests.bench.node import bench_node
from tests.fakes.libcni import STANDARD_PLUGINS, Runtime, install_plugin, run_plugin
from tests.fakes.netns import Namespace

BRIDGE = "tsrbench-br0"
WARM_UP = 3


def networks(folder: Path) -> dict[str, Runtime]:
    path = [str(folder), STANDARD_PLUGINS]
    ipam = {
        "type": "host-local",
        "dataDir": str(folder / "host-local"),
        "ranges": [[{"subnet": "10.251.0.0/16"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "ipam": ipam}
    tessera = {"type": "tessera", "namespace": "shop", "labels": {"app": "client"}}
    return {
        name: Runtime({"cniVersion": "1.0.0", "name": "bench", "plugins": [plugin]}, path)
        for name, plugin in (("tessera", tessera), ("bridge and host-local", bridge))
    }


def one(runtime: Runtime, space: Namespace, container: str) -> tuple[float, float]:
    """(ADD, DEL)."""
    started = time.perf_counter()
    runtime.add(container, space.path)
    added = time.perf_counter() - started
    started = time.perf_counter()
    runtime.delete(container, space.path)
    return added, time.perf_counter() - started


def version(plugin: Path) -> float:
    environ = {"CNI_COMMAND": "VERSION", "PATH": os.environ["PATH"]}
    started = time.perf_counter()
    status, printed = run_plugin(plugin, environ, json.dumps({"cniVersion": "1.0.0"}).encode())
    took = time.perf_counter() - started
    assert not status, printed
    return took


def main(rounds: int = 200) -> None:
    add: dict[str, list[float]] = defaultdict(list)
    delete: dict[str, list[float]] = defaultdict(list)
    spaces = [Namespace.create("tsr-bench") for _ in range(2)]
    try:
        with bench_node("cni") as node, tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            plugin = install_plugin(folder, node.stack.layout.socket("agent"))
            for i in range(rounds + WARM_UP):
                for (kind, runtime), space in zip(networks(folder).items(), spaces, strict=True):
                    took = one(runtime, space, f"c{i}")
                    if i >= WARM_UP:
                        add[kind].append(took[0])
                        delete[kind].append(took[1])
                if i >= WARM_UP:
                    add["tessera's VERSION"].append(version(plugin))
    finally:
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)
        for space in spaces:
            space.delete()
    figures.table(f"CNI ADD, {rounds} times", add)
    figures.table(f"CNI DEL, {rounds} times", delete)


if __name__ == "__main__":
    print(figures.machine())
    main()
