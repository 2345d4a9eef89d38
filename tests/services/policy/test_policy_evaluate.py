"""Offline cases: what is asked is answered, what is broken is named."""

from __future__ import annotations

import json

import msgspec
import pytest
from typer.testing import CliRunner

from services.cli.policy import app
from services.policy.cases import Case
from services.policy.evaluate import evaluate
from services.runtime.errors import Invalid

WEB = {
    "apiVersion": "cilium.io/v2",
    "kind": "CiliumNetworkPolicy",
    "metadata": {"name": "web", "namespace": "shop"},
    "spec": {
        "endpointSelector": {"matchLabels": {"app": "web"}},
        "ingress": [
            {
                "fromEndpoints": [{"matchLabels": {"app": "front"}}],
                "toPorts": [
                    {
                        "ports": [{"port": "http", "protocol": "TCP"}],
                        "rules": {"http": [{"method": "GET"}]},
                    }
                ],
            }
        ],
        "egress": [{"toFQDNs": [{"matchPattern": "*.example.com"}]}],
    },
}


def pod(number, app_label):
    return {
        "id": number,
        "labels": [f"k8s:app={app_label}", "k8s:io.kubernetes.pod.namespace=shop"],
    }


def case(**changes):
    given = {
        "name": "shop",
        "identities": [
            pod(1001, "web"),
            pod(1002, "front"),
            {"id": 16777300, "labels": ["reserved:world"], "prefix": "192.0.2.1/32"},
        ],
        "dns": {"192.0.2.1": ["api.example.com"]},
        "policies": [{"object": WEB, "valid": False}],
        "subjects": [
            {
                "id": 1001,
                "named_ports": {"TCP/http": 8080},
                "probes": [
                    ["ingress", 1002, 6, 8080, "anything"],
                    ["ingress", 1002, 6, 80],
                    ["ingress", 2, 6, 8080],
                    ["egress", 16777300, 6, 443],
                    ["egress", 2, 6, 443],
                ],
            }
        ],
    }
    return given | changes


def judged(**changes):
    return evaluate(msgspec.convert(case(**changes), Case))


def test_names_of_ports_and_hosts_are_resolved_per_case():
    (subject,) = judged().subjects
    assert subject.verdicts == ("redirect", "deny", "deny", "allow", "deny")
    assert (subject.ingress_enforced, subject.egress_enforced) == (True, True)


def test_an_invalid_policy_is_named_and_left_out():
    broken = {**WEB, "spec": {"endpointSelector": {}, "ingress": [{"fromEntities": ["nobody"]}]}}
    result = judged(policies=[broken, WEB])
    assert [policy.valid for policy in result.policies] == [False, True]
    assert result.policies[0].error is not None
    assert result.policies[0].error.startswith("spec.ingress[0].fromEntities[0]: unsupported")
    assert result.subjects[0].verdicts[0] == "redirect"


def test_conflicting_parsers_are_an_error_of_the_endpoint():
    other = json.loads(
        json.dumps(WEB)
        .replace('"http": [', '"kafka": [')
        .replace('{"method": "GET"}', '{"topic": "orders"}')
    )
    (subject,) = judged(policies=[WEB, other]).subjects
    assert subject.error is not None
    assert "conflicting L7 parsers (http/kafka)" in subject.error


def test_an_unknown_subject_is_an_error_of_its_own():
    result = judged(subjects=[{"id": 7777, "probes": [["ingress", 1002, 6, 80]]}])
    assert result.subjects[0].error is not None
    assert "7777" in result.subjects[0].error


@pytest.mark.parametrize(
    "changes",
    [
        {"identities": [{"id": 1001, "labels": ["a b c:=;"]}]},
        {"identities": [{"id": -1, "labels": []}]},
        {"identities": [{"id": 1 << 40, "labels": []}]},
        {"identities": [{"id": 5000, "prefix": "10.0.0.0.0/8"}]},
        {"egress_named_ports": {"http": 80}},
        {"subjects": [{"id": 1001, "probes": [["sideways", 1, 6, 80]]}]},
        {"subjects": [{"id": 1001, "probes": [["ingress", -1, 6, 80]]}]},
    ],
)
def test_a_broken_case_is_refused_by_name(changes):
    with pytest.raises(Invalid, match="shop"):
        judged(**changes)


def test_the_command_answers_one_case_or_many(tmp_path):
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    one.write_text(json.dumps(case()))
    many.write_text(json.dumps({"format": "any", "cases": [case(), case(name="again")]}))
    run = CliRunner().invoke(app, ["eval", "-f", str(one), "-f", str(many), "-o", "json"])
    assert run.exit_code == 0, run.output
    answered = json.loads(run.stdout)["cases"]
    assert [each["name"] for each in answered] == ["shop", "shop", "again"]
    assert answered[0]["policies"] == [{"valid": True, "error": None}]
    assert answered[0]["subjects"][0]["verdicts"][0] == "redirect"
    table = CliRunner().invoke(app, ["eval", "-f", str(one)])
    assert "1001" in table.stdout


def test_a_case_that_cannot_be_judged_does_not_keep_the_others_from_it(tmp_path):
    file = tmp_path / "cases.json"
    broken = case(name="broken", egress_named_ports={"http": 80})
    file.write_text(json.dumps({"cases": [broken, case()]}))
    run = CliRunner().invoke(app, ["eval", "-f", str(file), "-o", "json"])
    assert run.exit_code == 1
    first, second = json.loads(run.stdout)["cases"]
    assert "port name 'http'" in first["error"]
    assert second["subjects"][0]["verdicts"][0] == "redirect"
    assert "error" not in second


@pytest.mark.parametrize(
    "given", [WEB, {"object": WEB}, {"object": WEB, "valid": False, "comment": [1]}]
)
def test_a_policy_is_an_object_or_wrapped_in_one(given):
    result = judged(policies=[given], recorded={"anything": 1}, k8s_divergent="policyTypes")
    assert result.policies[0].valid
    assert result.subjects[0].verdicts[0] == "redirect"


@pytest.mark.parametrize("given", [7, "policy", None, [], {"object": None}, {}])
def test_what_is_no_object_is_an_invalid_policy(given):
    result = judged(policies=[given, WEB])
    assert [policy.valid for policy in result.policies] == [False, True]


@pytest.mark.parametrize("proto", [1, 6, 17, 47, 58, 132, 255])
def test_protocols_are_numbers(proto):
    """A clause without ports is about every protocol; one with a port about its own."""
    wide = {
        **WEB,
        "spec": {"endpointSelector": {}, "ingress": [{"fromEntities": ["world"]}]},
    }
    asked = [{"id": 1001, "probes": [["ingress", 2, proto, 8], ["ingress", 1002, proto, 8]]}]
    (subject,) = judged(policies=[wide], subjects=asked).subjects
    assert subject.verdicts == ("allow", "deny")


def icmp_type_0():
    return {
        **WEB,
        "spec": {
            "endpointSelector": {},
            "ingress": [{"icmps": [{"fields": [{"type": 0}]}]}],
            "ingressDeny": [{"fromEntities": ["nobody"]}],
        },
    }


@pytest.mark.parametrize(
    ("changes", "options", "valid", "verdicts"),
    [
        ({}, [], False, ["allow", "allow"]),
        ({}, ["--dialect", "cilium-1.17"], True, ["allow", "allow"]),
        ({"source": "computed by cilium pkg/policy (1.17.0)"}, [], True, ["allow", "allow"]),
        ({"source": "cilium 1.17"}, ["--dialect", "tessera"], False, ["allow", "allow"]),
    ],
)
def test_what_was_recorded_with_another_engine_is_read_as_it_reads(
    tmp_path, changes, options, valid, verdicts
):
    """1.17 looks at no deny clause, and takes ICMP type 0 for every type."""
    file = tmp_path / "case.json"
    asked = [{"id": 1001, "probes": [["ingress", 2, 1, 0], ["ingress", 2, 1, 8]]}]
    file.write_text(json.dumps(case(policies=[icmp_type_0()], subjects=asked, **changes)))
    run = CliRunner().invoke(app, ["eval", "-f", str(file), "-o", "json", *options])
    (answered,) = json.loads(run.stdout)["cases"]
    assert answered["policies"][0]["valid"] == valid
    assert answered["subjects"][0]["verdicts"] == verdicts


def test_icmp_type_0_is_one_type_in_the_own_reading():
    spec = {"endpointSelector": {}, "ingress": [{"icmps": [{"fields": [{"type": "EchoReply"}]}]}]}
    asked = [{"id": 1001, "probes": [["ingress", 2, 1, 0], ["ingress", 2, 1, 8]]}]
    (subject,) = judged(policies=[{**WEB, "spec": spec}], subjects=asked).subjects
    assert subject.verdicts == ("allow", "deny")


def test_null_reads_as_absent():
    (subject,) = judged(policies=None, dns=None, egress_named_ports=None).subjects
    assert set(subject.verdicts) == {"allow"}
