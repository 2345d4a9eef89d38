"""Policies at random, of a few shapes that meet in every way."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

PEERS = (
    '{"fromEndpoints": [{"matchLabels": {"app": "APP"}}]}',
    '{"fromEndpoints": [{}]}',
    '{"fromEndpoints": [{"matchExpressions": '
    '[{"key": "app", "operator": "NotIn", "values": ["APP"]}]}]}',
    '{"fromEntities": ["cluster"]}',
    '{"fromEntities": ["all"]}',
    '{"fromCIDR": ["10.0.0.0/8"]}',
    "{}",
)
TO_PORTS = (
    [],
    [{"port": "8080", "protocol": "TCP"}],
    [{"port": "8080", "endPort": 8090, "protocol": "TCP"}],
    [{"port": "9000"}],
    [{"port": "0", "protocol": "TCP"}],
    [{"port": "9000", "protocol": "UDP"}],
)


def random_policy(rng: random.Random, number: int, apps: Sequence[str]) -> str:
    """In namespace shop, about endpoints labelled app=..."""
    subject = rng.choice([{}, {"matchLabels": {"app": rng.choice(apps)}}])
    spec: dict[str, object] = {"endpointSelector": subject}
    for _ in range(rng.randint(1, 2)):
        side = rng.choice(["ingress", "ingress", "egress", "egress", "ingressDeny", "egressDeny"])
        text = rng.choice(PEERS).replace("APP", rng.choice(apps))
        clause = json.loads(text if side.startswith("in") else text.replace("from", "to"))
        if ports := rng.choice(TO_PORTS):
            clause["toPorts"] = [{"ports": ports}]
        spec[side] = [clause]
    return json.dumps(
        {
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumNetworkPolicy",
            "metadata": {"name": f"random-{number}", "namespace": "shop"},
            "spec": spec,
        }
    )
