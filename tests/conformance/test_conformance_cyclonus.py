"""Truth tables of generated NetworkPolicies: who reaches whom, by both directions."""

from __future__ import annotations

from typing import Any

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.policy.clauses import Direction
from services.policy.compile import Verdict
from services.policy.resolve import ResolverSettings
from tests.conformance.vectors import Refused, Tally, World, accept, load

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}


def test_cyclonus_tables_agree():
    tally = Tally("k8s_cyclonus (steps)")
    for case in load("k8s_cyclonus")["cases"]:
        for n, step in enumerate(case["steps"]):
            try:
                policies = [accept(each) for each in step["policies"]]
            except Refused as refused:
                if refused.outside:
                    tally.outside[refused.outside.split(" (")[0]] += 1
                else:
                    tally.wrong.append(f"{case['name']} {n}: {refused.problems}")
                continue
            judge(f"{case['name']} {n}", step, policies, tally)
    tally.report()
    assert tally.agree >= 200


def judge(name: str, step: Any, policies: list[Any], tally: Tally) -> None:
    numbers: dict[str, NumericIdentity] = {}
    identities: dict[NumericIdentity, Labels] = {}
    for n, pod in enumerate(step["pods"]):
        number = NumericIdentity(1000 + n)
        numbers[f"{pod['namespace']}/{pod['name']}"] = number
        identities[number] = labels_of(pod, step["namespaces"][pod["namespace"]])
    world = World.of(policies, identities, ResolverSettings())
    wrong = []
    for probe in step["probes"]:
        tally.probes += len(step["pod_order"]) ** 2
        table = table_of(world, [numbers[pod] for pod in step["pod_order"]], probe)
        if table is not None and table != probe["cilium"]:
            wrong.append(f"{name} {probe['proto']}/{probe['port']}: {table} {probe['cilium']}")
    if wrong:
        tally.wrong += wrong
    else:
        tally.agree += 1


def labels_of(pod: Any, namespace: dict[str, str]) -> Labels:
    texts = [f"k8s:{key}={value}" for key, value in pod["labels"].items()]
    texts += [
        f"k8s:io.cilium.k8s.namespace.labels.{key}={value}" for key, value in namespace.items()
    ]
    texts.append(f"k8s:io.kubernetes.pod.namespace={pod['namespace']}")
    return Labels.parse([*texts, "k8s:io.cilium.k8s.policy.cluster=default"])


def table_of(world: World, pods: list[NumericIdentity], probe: Any) -> list[str] | None:
    """None: the probe asks for a named port."""
    proto, port = PROTOCOLS[probe["proto"]], probe["port"]
    if not isinstance(port, int):
        return None

    def passes(source: NumericIdentity, target: NumericIdentity) -> bool:
        out = world.verdict(source, Direction.EGRESS, target, proto, port)
        into = world.verdict(target, Direction.INGRESS, source, proto, port)
        return out is Verdict.ALLOW and into is Verdict.ALLOW

    return ["".join(".X"[not passes(a, b)] for b in pods) for a in pods]
