"""300 random policy sets, judged by probes, through the offline evaluator."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import msgspec

from services.policy.cases import Case, CaseResult, SubjectResult, dialect_of
from services.policy.evaluate import evaluate
from services.policy.features import Dialect
from tests.conformance.vectors import Tally, every_icmp_type, load

ICMP = 1
# Where Tessera's own reading differs from the recorded engine's on purpose, and nowhere else.
DENY_CHECKED = "a deny clause with two peer fields is refused, 1.17 does not look at it"
NO_RESERVED = "a namespaceSelector of NotIn alone chooses pods, not the world or the host"
OTHER_READING = {
    "fuzz-00049": DENY_CHECKED,
    "fuzz-00072": DENY_CHECKED,
    "fuzz-00094": DENY_CHECKED,
    "fuzz-00157": DENY_CHECKED,
    "fuzz-00205": NO_RESERVED,
    "fuzz-00272": NO_RESERVED,
    "fuzz-00290": DENY_CHECKED,
    "fuzz-00294": DENY_CHECKED,
}
SIDES = {"ingress": "Ingress", "egress": "Egress"}


def test_fuzz_cases_agree():
    """In the dialect they were recorded in, but for the types that Kubernetes reads otherwise."""
    tally = Tally("fuzz_open")
    for case in load("fuzz_open")["cases"]:
        tally.probes += sum(len(subject.get("probes", ())) for subject in case["subjects"])
        wrong = list(differences(case, judged(types_present(case), Dialect.CILIUM_1_17)))
        tally.agree += not wrong
        tally.wrong += [f"{case['name']} {line}" for line in wrong]
    tally.report()
    assert tally.agree == 300


def test_fuzz_cases_say_by_themselves_how_they_are_read():
    recorded = load("fuzz_open")
    for case in recorded["cases"]:
        assert dialect_of(msgspec.convert(case, Case), None) is Dialect.CILIUM_1_17
        nameless = msgspec.convert({**case, "source": ""}, Case)
        assert dialect_of(nameless, recorded["format"]) is Dialect.CILIUM_1_17
        assert dialect_of(nameless, None) is Dialect.TESSERA


def test_the_own_reading_differs_where_it_is_meant_to():
    tally = Tally("fuzz_open, own reading")
    for case in load("fuzz_open")["cases"]:
        name = case["name"]
        as_recorded = every_icmp_type(types_present(case))
        tally.probes += sum(len(subject.get("probes", ())) for subject in case["subjects"])
        wrong = list(differences(case, judged(as_recorded)))
        if not wrong:
            tally.agree += 1
            assert name not in OTHER_READING, f"{name} agrees; take it off the list"
        elif name in OTHER_READING:
            tally.excepted[OTHER_READING[name]] += 1
        else:
            tally.wrong += [f"{name} {line}" for line in wrong]
    tally.report()
    assert tally.agree == 292


def test_rules_of_a_direction_that_policy_types_omit_say_nothing():
    """Kubernetes' meaning, where the recording has the other: there the rules bring the type."""
    tally = Tally("fuzz_open, types omitted")
    for case in load("fuzz_open")["cases"]:
        if "k8s_divergent" not in case:
            assert types_present(case) == case
            continue
        without = without_omitted(case)
        assert without != case
        assert types_present(case) != case
        here, meant = judged(case), judged(without)
        tally.probes += sum(len(subject.verdicts) for subject in here.subjects)
        if here == meant:
            tally.agree += 1
        else:
            tally.wrong.append(case["name"])
    tally.report()
    assert tally.agree == 28


def test_icmp_type_0_is_one_type():
    """The recording has it for every type; so do the cases above, rewritten to say so."""
    rewritten = 0
    for case in load("fuzz_open")["cases"]:
        widened = every_icmp_type(case)
        if widened == case:
            continue
        rewritten += 1
        narrow, wide = judged(case), judged(widened)
        for subject, ours, theirs in zip(
            case["subjects"], narrow.subjects, wide.subjects, strict=True
        ):
            for probe, one, every in zip(
                subject["probes"], ours.verdicts, theirs.verdicts, strict=True
            ):
                other_type = probe[2] == ICMP and probe[3] != 0
                assert one == every or other_type, (case["name"], probe, one, every)
    print(f"\nfuzz_open: {rewritten} cases with ICMP type 0")
    assert rewritten


def judged(case: Any, dialect: Dialect = Dialect.TESSERA) -> CaseResult:
    return evaluate(msgspec.convert(case, Case), dialect)


def network_policies(case: Any) -> Iterator[Any]:
    for given in case["policies"]:
        document = given.get("object", given)
        if document["kind"] == "NetworkPolicy":
            yield document["spec"]


def types_present(case: Any) -> Any:
    """The case with every direction that has rules among the types."""
    widened = copy.deepcopy(case)
    for spec in network_policies(widened):
        if spec.get("policyTypes"):
            named = [SIDES[side] for side in SIDES if spec.get(side)]
            spec["policyTypes"] = list(dict.fromkeys([*spec["policyTypes"], *named]))
    return widened


def without_omitted(case: Any) -> Any:
    """The case without the rules whose direction is not among the types."""
    narrowed = copy.deepcopy(case)
    for spec in network_policies(narrowed):
        for side, word in SIDES.items():
            if spec.get("policyTypes") and word not in spec["policyTypes"]:
                spec.pop(side, None)
    return narrowed


def differences(case: Any, result: CaseResult) -> Iterator[str]:
    for n, (recorded, here) in enumerate(zip(case["policies"], result.policies, strict=True)):
        if recorded["valid"] != here.valid:
            yield f"policies[{n}] {here}"
    for recorded, here in zip(case["subjects"], result.subjects, strict=True):
        yield from subject_differences(recorded, here)


def subject_differences(recorded: Any, here: SubjectResult) -> Iterator[str]:
    if recorded.get("expect_error"):
        if here.error is None:
            yield f"{here.id} has no conflict"
        return
    if here.error is not None:
        yield f"{here.id} {here.error}"
    enforced = recorded["ingress_enforced"], recorded["egress_enforced"]
    if enforced != (here.ingress_enforced, here.egress_enforced):
        yield f"{here.id} enforced {here.ingress_enforced} {here.egress_enforced}"
    for row, verdict in zip(recorded["probes"], here.verdicts, strict=True):
        there = row[5]["newer_lookup"] if len(row) > 5 else row[4]
        if verdict != there:
            yield f"{here.id} {row} here {verdict}"
