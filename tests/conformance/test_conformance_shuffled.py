"""Recorded policies and identities in new company, judged by the engine and by a second reading.

The second reading (plain_reading.py) is held against the recordings first; then policies of several
cases meet the identities of another, and both must say the same of every probe.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import msgspec

from services.policy.cases import Case, CaseResult
from services.policy.evaluate import evaluate
from services.policy.features import Dialect
from tests.conformance.plain_reading import Plain
from tests.conformance.test_conformance_fuzz import types_present
from tests.conformance.vectors import Tally, load

SHUFFLED = int(os.environ.get("TESSERA_SHUFFLED_CASES", "60"))
PROTOCOLS = (1, 6, 17, 47, 58, 132)
PORTS = (0, 1, 8, 53, 79, 80, 81, 128, 443, 1443, 8080, 8085, 9090, 9092, 65535)


def judged(case: Any) -> CaseResult:
    return evaluate(msgspec.convert(case, Case), Dialect.CILIUM_1_17)


def without_handshakes(node: Any) -> Any:
    match node:
        case dict():
            kept = node.items()
            return {k: without_handshakes(v) for k, v in kept if k != "authentication"}
        case list():
            return [without_handshakes(each) for each in node]
        case _:
            return node


def test_the_second_reading_agrees_with_the_recordings():
    tally = Tally("fuzz_open, second reading")
    for case in load("fuzz_open")["cases"]:
        shown = types_present(case)
        plain = Plain(shown, [policy["valid"] for policy in case["policies"]])
        wrong = [
            f"{case['name']} {subject['id']} {row} here {here}"
            for subject in shown["subjects"]
            if not subject.get("expect_error")
            for row, here in zip(subject["probes"], plain.verdicts(subject)[2], strict=True)
            if expected(row) != here and not expected(row).startswith("auth:")
        ]
        tally.agree += not wrong
        tally.wrong += wrong
    tally.report()


def expected(row: Any) -> str:
    return row[5]["newer_lookup"] if len(row) > 5 else row[4]


def test_both_readings_agree_on_new_company():
    rng = random.Random(20240817)
    tally = Tally("shuffled")
    for case in shuffled(load("fuzz_open")["cases"], rng):
        result = judged(case)
        plain = Plain(case, [policy.valid for policy in result.policies])
        wrong = []
        for subject, here in zip(case["subjects"], result.subjects, strict=True):
            if here.error is not None:
                assert "conflicting" in here.error, here.error
                tally.excepted["a conflict of parsers"] += 1
                continue
            ingress, egress, verdicts = plain.verdicts(subject)
            tally.probes += len(verdicts)
            if (ingress, egress) != (here.ingress_enforced, here.egress_enforced):
                wrong.append(f"{case['name']} {here.id} enforced")
            wrong += [
                f"{case['name']} {here.id} {row} engine {ours} plain {theirs}"
                for row, ours, theirs in zip(
                    subject["probes"], here.verdicts, verdicts, strict=True
                )
                if ours != theirs
            ]
        tally.agree += not wrong
        tally.wrong += wrong
    tally.report()
    assert tally.probes > 100 * SHUFFLED


def shuffled(recorded: list[Any], rng: random.Random) -> Iterator[Any]:
    for n in range(SHUFFLED):
        home = rng.choice(recorded)
        policies = [
            rng.choice(rng.choice(recorded)["policies"])["object"] for _ in range(rng.randint(1, 8))
        ]
        numbers = [one["id"] for one in home["identities"]]
        subjects = [
            {
                **subject,
                "probes": [
                    [
                        rng.choice(("ingress", "egress")),
                        rng.choice([*numbers, 1, 2, 4, 6, 7, 8]),
                        rng.choice(PROTOCOLS),
                        rng.choice(PORTS),
                    ]
                    for _ in range(80)
                ],
            }
            for subject in home["subjects"]
        ]
        yield {
            **home,
            "name": f"shuffled-{n}",
            "enforcement_mode": rng.choice(("default", "default", "default", "always", "never")),
            "policies": without_handshakes(policies),
            "subjects": subjects,
        }
