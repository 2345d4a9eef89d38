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


def test_null_reads_as_absent():
    (subject,) = judged(policies=None, dns=None, egress_named_ports=None).subjects
    assert set(subject.verdicts) == {"allow"}
