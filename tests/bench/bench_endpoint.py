"""One endpoint, from the request to the agent until it is enforced, and its end.

    POST ──► identity, address, policy ──► veth, programs, rows ──► announced, answered 201

Beside it, interleaved: the same interface by iproute2 commands, without identity, address
management or policy. Of identities there are two kinds: labels that the cluster knows already, and
labels nobody has had before.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections import defaultdict

from tests.bench import figures
from tests.bench.node import BenchNode, bench_node
from tests.fakes.netns import Namespace

PLAIN_IP = "10.250.0.7"
PLAIN_LINK = "tsrbench0"


def created(node: BenchNode, space: Namespace, labels: list[str]) -> tuple[float, float]:
    """(create, delete)."""
    body = {
        "namespace": "shop",
        "name": "measured",
        "labels": labels,
        "netns": space.name,
        "interface": "eth0",
    }
    data = json.dumps(body).encode()
    started = time.perf_counter()
    made = node.agent.ask("POST", "/v1/endpoints", data)
    create = time.perf_counter() - started
    assert made["state"] == "ready", made
    started = time.perf_counter()
    node.agent.ask("DELETE", f"/v1/endpoints/{made['id']}")
    return create, time.perf_counter() - started


def by_commands(space: Namespace) -> tuple[float, float]:
    """(create, delete)."""
    inside = f"-n {space.name}"
    steps = (
        f"link add {PLAIN_LINK} type veth peer name eth0 netns {space.name}",
        f"{inside} addr add {PLAIN_IP}/32 dev eth0",
        f"{inside} link set eth0 up",
        f"link set {PLAIN_LINK} up",
        f"{inside} route add default dev eth0",
        f"route add {PLAIN_IP}/32 dev {PLAIN_LINK}",
    )
    started = time.perf_counter()
    for step in steps:
        subprocess.run(["ip", *step.split()], check=True)
    create = time.perf_counter() - started
    started = time.perf_counter()
    subprocess.run(["ip", "link", "del", PLAIN_LINK], check=True)
    return create, time.perf_counter() - started


def main(rounds: int = 60) -> None:
    create: dict[str, list[float]] = defaultdict(list)
    delete: dict[str, list[float]] = defaultdict(list)
    spaces = [Namespace.create("tsr-bench") for _ in range(2)]
    try:
        with bench_node("endpoint") as node:
            for i in range(rounds + 3):
                known = created(node, spaces[0], ["k8s:app=client"])
                new = created(node, spaces[0], ["k8s:app=new", f"k8s:n=x{i}"])
                plain = by_commands(spaces[1])
                if i < 3:
                    continue
                for n, rows in enumerate((create, delete)):
                    rows["known labels"].append(known[n])
                    rows["new labels"].append(new[n])
                    rows["ip commands, no policy"].append(plain[n])
    finally:
        for space in spaces:
            space.delete()
    figures.table(f"endpoint created, {rounds} times", create)
    figures.table(f"endpoint deleted, {rounds} times", delete)


if __name__ == "__main__":
    print(figures.machine())
    main()
