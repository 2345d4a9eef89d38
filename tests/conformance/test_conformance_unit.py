"""Rules recorded while the engine's own tests ran: bare rules, nothing added to selectors."""

from __future__ import annotations

from typing import Any

import pytest

from identity.labels import Labels
from identity.numbers import FIRST_LOCAL, NumericIdentity
from services.policy.clauses import Direction
from services.policy.compile import Verdict
from services.policy.resolve import ResolverSettings
from tests.conformance.vectors import (
    DIRECTIONS,
    Refused,
    Tally,
    World,
    accept_rule,
    accept_rules,
    load,
    row_verdict,
    without,
)

PORTS = (0, 1, 53, 79, 80, 81, 443, 8080, 65535)
PROBES = [*((proto, port) for proto in (6, 17, 132) for port in PORTS), (1, 8), (58, 1), (47, 0)]
# In a protocol none of the rules name, only clauses without ports answer.
NO_PORTS = (47, 0)
PROTOCOLS = {"TCP": (6,), "UDP": (17,), "SCTP": (132,), "ANY": (6, 17, 132)}


@pytest.mark.parametrize("removed", [(), ("authentication",)])
def test_resolved_maps_agree(removed):
    tally = Tally(f"cilium_unit_resolve without {removed}")
    for case in load("cilium_unit_resolve")["cases"]:
        try:
            policy = accept_rules(without(case["rules"], removed))
        except Refused as refused:
            note_refusal(tally, case, refused)
            continue
        resolve(case, policy, tally)
    tally.report()
    assert tally.agree >= 85


def note_refusal(tally: Tally, case: Any, refused: Refused) -> None:
    if refused.outside:
        tally.outside[refused.outside.split(" (")[0]] += 1
    else:
        tally.wrong.append(f"{case['test']}: refused {refused.problems}")


def resolve(case: Any, policy: Any, tally: Tally) -> None:
    known = {
        NumericIdentity(int(n)): Labels.parse(labels) for n, labels in case["identities"].items()
    }
    pods = {n: labels for n, labels in known.items() if n < FIRST_LOCAL}
    settings = ResolverSettings(allow_localhost=False)
    world = World.of([policy], pods, settings, dual_stack=case["dual_stack"])
    subject = NumericIdentity(case["subject"])
    peers = {n: n for n in (*pods, *map(NumericIdentity, (1, 2, 6, 7)))} | {
        n: world.of_prefix(label.key)
        for n, labels in known.items()
        for label in labels
        if label.source == "cidr"
    }
    wrong = []
    for name, direction in DIRECTIONS.items():
        rows = [
            (
                r["id"],
                r["proto"],
                r["port"],
                r["port_prefix_len"],
                "deny" if r.get("deny") else "allow",
            )
            for r in case["map"]
            if r["dir"] == name
        ]
        for recorded, peer in peers.items():
            for proto, port in PROBES:
                here = world.verdict(subject, direction, peer, proto, port)
                there = row_verdict(rows, recorded, proto, port)
                tally.probes += 1
                if (here is Verdict.ALLOW) != (there == "allow"):
                    wrong.append(f"{case['test']} {name} {recorded} {proto}/{port}: {here!r}")
    if not wrong:
        tally.agree += 1
    elif case["test"].startswith("policy.Test_EnsureEntitiesSelectableByCIDR"):
        tally.known["a CIDR never chooses the host here"] += 1
    else:
        tally.wrong.append(wrong[0])


def test_questions_of_one_pair_agree():
    tally = Tally("cilium_unit_allows")
    for case in load("cilium_unit_allows")["cases"]:
        try:
            policy = accept_rules(case["rules"] or ())
        except Refused as refused:
            note_refusal(tally, case, refused)
            continue
        if any(port["name"] for port in case["dports"] or ()):
            tally.outside["asks for a named port"] += 1
            continue
        ask(case, policy, tally)
    tally.report()
    assert tally.agree >= 40


def ask(case: Any, policy: Any, tally: Tally) -> None:
    source, target = Labels.parse(case["from"]), Labels.parse(case["to"])
    numbers = {source: NumericIdentity(1001), target: NumericIdentity(1002)}
    for labels in numbers:
        if "reserved:world" in labels.strings():
            numbers[labels] = NumericIdentity(2)
    pods = {n: labels for labels, n in numbers.items() if n > 2}
    # The recorded question presumes enforcement.
    settings = ResolverSettings(allow_localhost=False, enforcement="always")
    world = World.of([policy], pods, settings)
    direction = DIRECTIONS[case["dir"]]
    ingress = direction is Direction.INGRESS
    subject, peer = (target, source) if ingress else (source, target)
    here = all(
        any(
            world.verdict(numbers[subject], direction, numbers[peer], proto, number)
            is Verdict.ALLOW
            for proto, number in questions(port)
        )
        for port in case["dports"] or [{"port": 0, "proto": "ANY"}]
    )
    tally.probes += 1
    if ("allowed" if here else "denied") == case["verdict"]:
        tally.agree += 1
    else:
        tally.wrong.append(f"{case}")


def questions(port: Any) -> list[tuple[int, int]]:
    asked = [(proto, port["port"]) for proto in PROTOCOLS[port["proto"]]]
    return [NO_PORTS] if not port["port"] else asked


def test_validation_agrees():
    tally = Tally("cilium_unit_validation")
    for case in load("cilium_unit_validation")["cases"]:
        try:
            accept_rule(case["rule"])
        except Refused as refused:
            if not case["valid"]:
                tally.agree += 1
            else:
                note_refusal(tally, case, refused)
            continue
        if case["valid"]:
            tally.agree += 1
        else:
            tally.wrong.append(f"accepted {case}")
    tally.report()
    assert tally.agree >= 150
