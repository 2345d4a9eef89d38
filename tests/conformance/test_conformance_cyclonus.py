"""Truth tables of generated NetworkPolicies: who reaches whom, by both directions."""

from __future__ import annotations

from typing import Any

import pytest

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.policy.clauses import Direction, NamedPort
from services.policy.resolve import ResolverSettings
from tests.conformance.vectors import Tally, World, accept, load

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}


# The simulator's pods all have these container ports.
NAMES = {
    NamedPort(PROTOCOLS[proto], f"serve-{port}-{proto.lower()}"): port
    for proto in PROTOCOLS
    for port in (80, 81)
}
COLUMNS = {
    "combined": ResolverSettings(),
    "cilium": ResolverSettings(by_address=frozenset()),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_cyclonus_tables_agree(column):
    tally = Tally(f"k8s_cyclonus {column}")
    for case in load("k8s_cyclonus")["cases"]:
        for n, step in enumerate(case["steps"]):
            policies = [accept(each) for each in step["policies"]]
            judge(f"{case['name']} {n}", step, policies, column, tally)
    tally.report()
    assert tally.agree == 1521


def judge(name: str, step: Any, policies: list[Any], column: str, tally: Tally) -> None:
    numbers: dict[str, NumericIdentity] = {}
    identities: dict[NumericIdentity, Labels] = {}
    addresses: dict[NumericIdentity, str] = {}
    for n, pod in enumerate(step["pods"]):
        number = NumericIdentity(1000 + n)
        numbers[f"{pod['namespace']}/{pod['name']}"] = number
        identities[number] = labels_of(pod, step["namespaces"][pod["namespace"]])
        addresses[number] = pod["ip"]
    world = World.of(policies, identities, COLUMNS[column], names=NAMES)
    for number, address in addresses.items():
        world.resolver.set_addresses(number, [address])
    for probe in step["probes"]:
        tally.probes += len(step["pod_order"]) ** 2
        table = table_of(world, [numbers[pod] for pod in step["pod_order"]], probe)
        if table == probe[column]:
            tally.agree += 1
        else:
            asked = f"{name} {probe['proto']}/{probe['port']}"
            tally.wrong.append(f"{asked}: {table} {probe[column]}")


def labels_of(pod: Any, namespace: dict[str, str]) -> Labels:
    texts = [f"k8s:{key}={value}" for key, value in pod["labels"].items()]
    texts += [
        f"k8s:io.cilium.k8s.namespace.labels.{key}={value}" for key, value in namespace.items()
    ]
    texts.append(f"k8s:io.kubernetes.pod.namespace={pod['namespace']}")
    return Labels.parse([*texts, "k8s:io.cilium.k8s.policy.cluster=default"])


def table_of(world: World, pods: list[NumericIdentity], probe: Any) -> list[str]:
    proto, port = PROTOCOLS[probe["proto"]], probe["port"]
    number = port if isinstance(port, int) else NAMES[NamedPort(proto, port)]

    def passes(source: NumericIdentity, target: NumericIdentity) -> bool:
        out = world.verdict(source, Direction.EGRESS, target, proto, number)
        into = world.verdict(target, Direction.INGRESS, source, proto, number)
        return out == into == "allow"

    return ["".join(".X"[not passes(a, b)] for b in pods) for a in pods]
