"""300 random policy sets, judged by probes.

Twice: as they are, and with what needs a proxy or a handshake removed (L7 rules, server names,
authentication), where a recorded redirect counts as allowed: which peers and ports are let in at
all is the same question without them.
"""

from __future__ import annotations

from typing import Any

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.policy.clauses import PortRange
from services.policy.resolve import ResolverSettings
from tests.conformance.vectors import (
    DIRECTIONS,
    VERDICTS,
    Refused,
    Tally,
    World,
    accept,
    load,
    without,
)

REMOVED = ("rules", "serverNames", "authentication")
# 1.17 does not look at deny clauses; here they are validated.
DENY_UNCHECKED = "refused here, a deny clause with two peer fields"


def test_fuzz_cases_agree_as_they_are():
    tally = Tally("fuzz_open")
    for case in load("fuzz_open")["cases"]:
        judge(case, tally, [p["object"] for p in case["policies"]])
    tally.report()
    assert tally.agree >= 100


def test_fuzz_cases_agree_without_proxy_and_handshake():
    tally = Tally("fuzz_open without L7, TLS and authentication")
    for case in load("fuzz_open")["cases"]:
        judge(case, tally, [without(p["object"], REMOVED) for p in case["policies"]])
    tally.report()
    assert tally.agree >= 150


def judge(case: Any, tally: Tally, objects: list[Any]) -> None:
    accepted = []
    for recorded, each in zip(case["policies"], objects, strict=True):
        try:
            policy = accept(each)
        except Refused as refused:
            if refused.outside:
                tally.outside[refused.outside.split(" (")[0]] += 1
                return
            if recorded["valid"]:
                deny = all("Deny[" in p.path for p in refused.problems)
                if not deny:
                    tally.wrong.append(f"{case['name']}: refused {refused.problems}")
                else:
                    tally.known[DENY_UNCHECKED] += 1
                return
            continue
        if not recorded["valid"]:
            tally.wrong.append(f"{case['name']}: accepted {each}")
            return
        accepted.append(policy)
    if any(subject.get("expect_error") for subject in case["subjects"]):
        tally.outside["conflict of L7 parsers"] += 1
        return
    compare(case, tally, accepted)


def compare(case: Any, tally: Tally, accepted: list[Any]) -> None:
    pods = {
        NumericIdentity(i["id"]): Labels.parse(i["labels"])
        for i in case["identities"]
        if not i.get("prefix") and i["id"] < 1 << 24
    }
    settings = ResolverSettings(enforcement=case["enforcement_mode"])
    world = World.of(accepted, pods, settings, dual_stack=case["dual_stack"])
    prefixes = {i["id"]: i["prefix"] for i in case["identities"] if i.get("prefix")}
    wrong = [
        f"{case['name']} {subject['id']} {row}: here {here}"
        for subject in case["subjects"]
        for row in subject.get("probes", ())
        if (here := ask(world, subject, row, prefixes)) != expected(row)
    ]
    wrong += [
        f"{case['name']} {subject['id']} enforced {flags(world, subject)}"
        for subject in case["subjects"]
        if flags(world, subject) != (subject["ingress_enforced"], subject["egress_enforced"])
    ]
    if any_icmp_type_0(accepted):
        before = len(wrong)
        wrong = [line for line in wrong if ", 1, " not in line.split(":")[0]]
        tally.differing["probe: ICMP type 0 opens every type in 1.17"] += before - len(wrong)
    tally.probes += sum(len(subject.get("probes", ())) for subject in case["subjects"])
    if not wrong:
        tally.agree += 1
    elif "k8s_divergent" in case:
        tally.known["NetworkPolicy rules outside of policyTypes are ignored here"] += 1
    elif any(negative_namespaces(p["object"]) for p in case["policies"]):
        tally.known["a namespaceSelector of NotIn alone chooses no world or host here"] += 1
    else:
        tally.wrong += wrong


def any_icmp_type_0(policies: list[Any]) -> bool:
    type_0 = PortRange(1, 0, 0)
    return any(
        type_0 in (clause.ports or ())
        for policy in policies
        for rule in policy.rules
        for clause in rule.clauses
    )


def negative_namespaces(node: Any) -> bool:
    """1.17 matches it against every label set; the API speaks of pods in namespaces."""
    if isinstance(node, list):
        return any(map(negative_namespaces, node))
    if not isinstance(node, dict):
        return False
    selector = node.get("namespaceSelector") or {}
    operators = {e["operator"] for e in selector.get("matchExpressions", ())}
    if operators and operators <= {"NotIn", "DoesNotExist"} and not selector.get("matchLabels"):
        return True
    return any(map(negative_namespaces, node.values()))


def flags(world: World, subject: Any) -> tuple[bool, bool]:
    local = world.resolver.local_policy(NumericIdentity(subject["id"]))
    return local.ingress_enforced, local.egress_enforced


def ask(world: World, subject: Any, row: list[Any], prefixes: dict[int, str]) -> str:
    direction, peer, proto, port = row[:4]
    peer = world.of_prefix(prefixes[peer]) if peer in prefixes else NumericIdentity(peer)
    found = world.verdict(NumericIdentity(subject["id"]), DIRECTIONS[direction], peer, proto, port)
    return VERDICTS[found]


def expected(row: list[Any]) -> str:
    verdict = row[5]["newer_lookup"] if len(row) > 5 else row[4]
    return "deny" if verdict == "deny" else "allow"
