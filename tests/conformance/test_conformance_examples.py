"""Policies shipped as examples: valid ones are accepted, the others are not."""

from __future__ import annotations

from services.policy.features import Dialect
from tests.conformance.vectors import Refused, Tally, accept, accept_in, accept_rules, load

# Refused on purpose: a field that 1.17 does not know either, and drops without a word.
UNKNOWN_FIELD = "unknown field"


def test_example_policies_are_accepted():
    tally = Tally("cilium_examples")
    for case in load("cilium_examples")["cases"]:
        document = case["object"]
        try:
            if document["kind"] == "Rules":  # an older form: rules without an object around them
                accept_rules(document["rules"])
            else:
                accept(document)
        except Refused as refused:
            unknown = [p for p in refused.problems if UNKNOWN_FIELD in p.message]
            if not case["valid"]:
                tally.agree += 1
            elif unknown:
                tally.excepted[f"{unknown[0].message} at {unknown[0].path}"] += 1
            else:
                tally.wrong.append(f"{case['name']}: {refused.problems}")
            continue
        if case["valid"]:
            tally.agree += 1
        else:
            tally.wrong.append(f"accepted {case}")
    tally.report()
    assert tally.agree == 165


def test_the_recorded_dialect_accepts_every_valid_one():
    tally = Tally("cilium_examples, as 1.17 reads them")
    for case in load("cilium_examples")["cases"]:
        if case["object"]["kind"] == "Rules":
            continue
        try:
            accept_in(Dialect.CILIUM_1_17, case["object"])
            valid = True
        except Refused:
            valid = False
        if valid == case["valid"]:
            tally.agree += 1
        else:
            tally.wrong.append(str(case))
    tally.report()
    assert tally.agree == 124
