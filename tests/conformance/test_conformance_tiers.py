"""ClusterNetworkPolicy: the upstream suite's states, both ends of each connection judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from identity.labels import Labels
from identity.numbers import REMOTE_NODE, NumericIdentity
from services.policy.clauses import Direction
from services.policy.resolve import ResolverSettings
from tests.conformance.vectors import Tally, World, accept, load

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}


def test_tiers_agree():
    tally = Tally("k8s_clusternetworkpolicy (probes)")
    for case in load("k8s_clusternetworkpolicy")["cases"]:
        numbers, world = world_of(case)
        for probe in case["probes"]:
            source, target = numbers[probe["from"]], numbers[probe["to"]]
            here = "allow" if passes(world, source, target, probe) else "deny"
            tally.probes += 1
            if here == probe["expect"]:
                tally.agree += 1
            else:
                tally.wrong.append(f"{case['name']} {probe}")
    tally.report()
    assert tally.agree == 286


def world_of(case: Any) -> tuple[Mapping[str, NumericIdentity], World]:
    """Each endpoint has an identity of its own; those on the host's network share the node's."""
    numbers: dict[str, NumericIdentity] = {}
    identities: dict[NumericIdentity, Labels] = {}
    addresses: dict[NumericIdentity, str] = {}
    for n, endpoint in enumerate(case["endpoints"]):
        name = f"{endpoint['namespace']}/{endpoint['name']}"
        if endpoint["host_network"]:
            numbers[name] = REMOTE_NODE
            continue
        number = numbers[name] = NumericIdentity(1000 + n)
        identities[number] = labels_of(endpoint, case["namespaces"][endpoint["namespace"]])
        addresses[number] = endpoint["ip"]
    policies = [accept(policy) for policy in case["policies"]]
    world = World.of(policies, identities, ResolverSettings())
    for number, address in addresses.items():
        world.resolver.set_addresses(number, [address])
    return numbers, world


def labels_of(endpoint: Any, namespace: Mapping[str, str]) -> Labels:
    texts = [f"k8s:{key}={value}" for key, value in endpoint["labels"].items()]
    texts += [
        f"k8s:io.cilium.k8s.namespace.labels.{key}={value}" for key, value in namespace.items()
    ]
    return Labels.parse([*texts, f"k8s:io.kubernetes.pod.namespace={endpoint['namespace']}"])


def passes(world: World, source: NumericIdentity, target: NumericIdentity, probe: Any) -> bool:
    proto, port = PROTOCOLS[probe["proto"]], probe["port"]
    out = world.verdict(source, Direction.EGRESS, target, proto, port)
    into = world.verdict(target, Direction.INGRESS, source, proto, port)
    return out == into == "allow"
