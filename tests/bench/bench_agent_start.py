"""The agent's start on a node that enforces already: checkpoint, pinned maps, attached programs.

Enforcement never stops meanwhile; measured is how long until the new process has taken it over:
from exec to the first answer of /v1/status, which comes after the programs were exchanged. Beside
it, interleaved: the bare interpreter, and the interpreter with the agent's imports. Memory is read
once the node is connected again.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from tests.bench import figures
from tests.bench.doors import Door, until
from tests.bench.node import BenchNode, Identities, bench_node
from tests.fakes.netns import Namespace

ENDPOINTS = 10
IDENTITIES = 1000


def restarted(node: BenchNode) -> float:
    stack = node.stack
    agent = stack.processes.pop("agent")
    agent.send_signal(signal.SIGTERM)
    agent.wait(15)
    socket = stack.layout.socket("agent")
    started = time.perf_counter()
    stack.start_process("agent")

    def answers() -> bool:
        assert stack.processes["agent"].poll() is None, stack.log("agent")
        try:
            door = Door(socket)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        report = door.ask("GET", "/v1/status")
        door.close()
        return bool(report)

    return until(answers) - started


def memory_mb(pid: int) -> tuple[float, float]:
    """(resident, its own share of it)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    found = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
    private = found["Private_Clean"] + found["Private_Dirty"]
    return found["Rss"] * 1024 / 1e6, private * 1024 / 1e6


def interpreter(source: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", source], check=True)
    return time.perf_counter() - started


def main(rounds: int = 15) -> None:
    samples: dict[str, list[float]] = defaultdict(list)
    resident: list[float] = []
    private: list[float] = []
    spaces = [Namespace.create("tsr-bench") for _ in range(ENDPOINTS)]
    try:
        with bench_node("start") as node:
            identities = Identities(node.stack)
            request, _ = identities.request(IDENTITIES)
            identities.send(request, []).result()
            for i, space in enumerate(spaces):
                node.stack.add(space, f"extra{i}", app="web")
            for _ in range(rounds):
                samples["exec -> /v1/status"].append(restarted(node))
                samples["python -c pass"].append(interpreter("pass"))
                imports = interpreter("import datapath.agent.main")
                samples["python -c 'import datapath.agent.main'"].append(imports)
                node.stack.wait_ready()
                one, own = memory_mb(node.stack.processes["agent"].pid)
                resident.append(one)
                private.append(own)
            identities.close()
    finally:
        for space in spaces:
            space.delete()
    what = f"{ENDPOINTS} endpoints, {IDENTITIES:,} identities"
    figures.table(f"agent started on a node with {what}, {rounds} times", samples)
    print(
        f"  memory once connected: {statistics.median(resident):.1f} MB resident,"
        f" {statistics.median(private):.1f} MB of it private"
    )


if __name__ == "__main__":
    print(figures.machine())
    main()
