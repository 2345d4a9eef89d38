"""Rules recorded while the engine's own tests ran: bare rules, nothing added to selectors."""

from __future__ import annotations

from typing import Any

from identity.labels import Labels
from identity.numbers import FIRST_LOCAL, HOST, NumericIdentity
from services.policy.clauses import Direction, NamedPort
from services.policy.features import Features
from services.policy.model import Policy
from services.policy.resolve import ResolverSettings
from tests.conformance.vectors import (
    DIRECTIONS,
    Refused,
    Row,
    Tally,
    World,
    accept_rule,
    accept_rules,
    load,
    row_verdict,
)

PORTS = (0, 1, 53, 79, 80, 81, 443, 8080, 65535)
PROBES = [*((proto, port) for proto in (6, 17, 132) for port in PORTS), (1, 8), (58, 1), (47, 0)]
# In a protocol none of the rules name, only clauses without ports answer.
NO_PORTS = (47, 0)
NAMES = {
    NamedPort(6, "port-80"): 80,
    NamedPort(6, "port-90"): 90,
}
PROTOCOLS = {"TCP": (6,), "UDP": (17,), "SCTP": (132,), "ANY": (6, 17, 132)}
# The recorded test gave its host an address and had CIDRs match it, which its record does not say.
HOST_ADDRESSES = {"policy.Test_EnsureEntitiesSelectableByCIDR.func2": ("172.19.0.1",)}


def test_resolved_maps_agree():
    tally = Tally("cilium_unit_resolve")
    for case in load("cilium_unit_resolve")["cases"]:
        try:
            policy = accept_rules(case["rules"])
        except Refused as refused:
            tally.wrong.append(f"{case['test']}: refused {refused.problems}")
            continue
        resolve(case, policy, tally)
    tally.report()
    assert tally.agree == 363


def resolve(case: Any, policy: Policy, tally: Tally) -> None:
    known = {
        NumericIdentity(int(n)): Labels.parse(labels) for n, labels in case["identities"].items()
    }
    pods = {n: labels for n, labels in known.items() if n < FIRST_LOCAL}
    subject = NumericIdentity(case["subject"])
    on_host = HOST_ADDRESSES.get(case["test"], ())
    by_address = frozenset({policy.ref.kind} if on_host else ())
    settings = ResolverSettings(allow_localhost=False, by_address=by_address)
    labels = Labels.parse(case["subject_labels"])
    world = World.of(
        [policy], pods, settings, dual_stack=case["dual_stack"], names=NAMES, subject=labels
    )
    world.resolver.set_addresses(HOST, on_host)
    peers = {n: n for n in (*pods, *map(NumericIdentity, (1, 2, 6, 7)))} | {
        n: world.of_prefix(label.key)
        for n, labels in known.items()
        for label in labels
        if label.source == "cidr"
    }
    wrong = []
    for name, direction in DIRECTIONS.items():
        rows = [row_of(r) for r in case["map"] if r["dir"] == name]
        for recorded, peer in peers.items():
            for proto, port in PROBES:
                here = world.verdict(subject, direction, peer, proto, port)
                there = row_verdict(rows, recorded, proto, port)
                tally.probes += 1
                # Rows of redirects without a proxy port were withheld from the recorded map.
                withheld = here == "redirect" and case["unrealized_redirects_skipped"]
                if here != there and not withheld:
                    wrong.append(f"{case['test']} {name} {recorded} {proto}/{port}: {here} {there}")
    if not wrong:
        tally.agree += 1
    else:
        tally.wrong.append(wrong[0])


def row_of(row: Any) -> Row:
    verdict = "deny" if row.get("deny") else "redirect" if row.get("redirect") else "allow"
    if row.get("auth"):
        verdict = f"auth:{row['auth']}"
    return row["id"], row["proto"], row["port"], row["port_prefix_len"], verdict


def test_questions_of_one_pair_agree():
    tally = Tally("cilium_unit_allows")
    for case in load("cilium_unit_allows")["cases"]:
        try:
            policy = accept_rules(case["rules"] or ())
        except Refused as refused:
            tally.wrong.append(f"{case['test']}: refused {refused.problems}")
            continue
        ask(case, policy, tally)
    tally.report()
    assert tally.agree == 83


def ask(case: Any, policy: Any, tally: Tally) -> None:
    source, target = Labels.parse(case["from"]), Labels.parse(case["to"])
    numbers = {source: NumericIdentity(1001), target: NumericIdentity(1002)}
    for labels in numbers:
        if "reserved:world" in labels.strings():
            numbers[labels] = NumericIdentity(2)
    pods = {n: labels for labels, n in numbers.items() if n > 2}
    # The recorded question presumes enforcement.
    settings = ResolverSettings(allow_localhost=False, enforcement="always")
    direction = DIRECTIONS[case["dir"]]
    ingress = direction is Direction.INGRESS
    subject, peer = (target, source) if ingress else (source, target)
    # Asked by number, the endpoint has no container port of that name.
    names = NAMES if any(port["name"] for port in case["dports"] or ()) else {}
    world = World.of([policy], pods, settings, names=names, subject=subject)
    here = all(
        any(
            world.verdict(numbers[subject], direction, numbers[peer], proto, number) != "deny"
            for proto, number in questions(port)
        )
        for port in case["dports"] or [{"port": 0, "proto": "ANY", "name": ""}]
    )
    tally.probes += 1
    if ("allowed" if here else "denied") == case["verdict"]:
        tally.agree += 1
    else:
        tally.wrong.append(f"{case}")


def questions(port: Any) -> list[tuple[int, int]]:
    number = NAMES[NamedPort(6, port["name"])] if port["name"] else port["port"]
    return [(proto, number) for proto in PROTOCOLS[port["proto"]]] if number else [NO_PORTS]


def test_validation_agrees():
    tally = Tally("cilium_unit_validation")
    for case in load("cilium_unit_validation")["cases"]:
        flags = case["flags"]
        features = Features.ALL if flags["nodesel"] else Features.ALL & ~Features.NODES
        try:
            accept_rule(case["rule"], features)
        except Refused as refused:
            valid, why = False, str(refused.problems)
        else:
            valid, why = True, "accepted"
        if valid == case["valid"]:
            tally.agree += 1
        else:
            tally.wrong.append(f"{why} {case}")
    tally.report()
    assert tally.agree == 374
