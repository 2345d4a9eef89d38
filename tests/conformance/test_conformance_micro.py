"""One fact each: empty versus absent, precedence, NetworkPolicy translation."""

from __future__ import annotations

from typing import Any

from identity.labels import Labels
from identity.numbers import FIRST_LOCAL, NumericIdentity
from services.policy.clauses import Direction
from services.policy.resolve import ResolverSettings
from tests.conformance.vectors import (
    Refused,
    Tally,
    World,
    accept,
    every_icmp_type,
    load,
    row_verdict,
)

API = {"NetworkPolicy": "networking.k8s.io/v1"}
SUBJECT = NumericIdentity(1001)
PEERS = (1, 2, 3, 4, 6, 7, 8, 1001, 1002, 1003)
PROBES = [
    *((proto, port) for proto in (6, 17, 132) for port in (0, 1, 53, 79, 80, 81, 100, 101, 65535)),
    *((1, icmp_type) for icmp_type in (0, 3, 8)),
    (58, 128),
    (47, 0),
]


def test_micro_cases_agree():
    recorded = load("cilium_micro")
    pods = {NumericIdentity(i["id"]): Labels.parse(i["labels"]) for i in recorded["identities"]}
    tally = Tally("cilium_micro")
    for case in recorded["cases"]:
        judge(case, pods, tally)
    tally.report()
    assert tally.agree == 71


def judge(case: Any, pods: dict[NumericIdentity, Labels], tally: Tally) -> None:
    try:
        accepted = [
            accept(each | {"apiVersion": API.get(each["kind"], "cilium.io/v2")})
            for each in every_icmp_type(case["policies"])
        ]
    except Refused as refused:
        if case["valid"]:
            tally.wrong.append(f"{case['name']}: refused {refused.problems}")
        else:
            tally.agree += 1
        return
    wrong = [] if case["valid"] else ["accepted"]
    world = World.of(accepted, pods, ResolverSettings(), subject=pods[SUBJECT])
    wrong += differences(case, world, tally)
    if not wrong:
        tally.agree += 1
    else:
        tally.wrong += [f"{case['name']}: {line}" for line in wrong]


def differences(case: Any, world: World, tally: Tally) -> list[str]:
    local = world.resolver.local_policy(SUBJECT)
    enforced = (local.ingress_enforced, local.egress_enforced)
    wrong = []
    if enforced != (case["ingress_enforced"], case["egress_enforced"]):
        wrong.append(f"enforced {enforced}")
    rows = [(*r[:4], f"auth:{r[5]}" if len(r) > 5 else r[4]) for r in case["ingress_map"]]
    peers = {peer: NumericIdentity(peer) for peer in PEERS} | prefixes(case, world)
    for recorded_peer, peer in peers.items():
        for proto, port in PROBES:
            here = world.verdict(SUBJECT, Direction.INGRESS, peer, proto, port)
            there = row_verdict(rows, recorded_peer, proto, port)
            tally.probes += 1
            if here != there:
                wrong.append(f"{recorded_peer} {proto}/{port}: here {here} there {there}")
    return wrong


def prefixes(case: Any, world: World) -> dict[int, NumericIdentity]:
    """Local numbers of the recording, wider prefix first, paired with ours."""
    recorded = sorted({row[0] for row in case["ingress_map"] if row[0] >= FIRST_LOCAL})
    own = sorted(world.resolver.prefixes(), key=lambda text: int(text.partition("/")[2]))
    paired = zip(recorded, own, strict=False)
    return {number: world.of_prefix(prefix) for number, prefix in paired}
