"""ClusterNetworkPolicy: reading it, and the order of the tiers."""

from __future__ import annotations

import json

import msgspec
import pytest

from services.policy.cases import Case
from services.policy.clauses import Tier
from services.policy.evaluate import evaluate
from services.policy.features import Features
from services.policy.parse import parse

SHOP = {"io.kubernetes.pod.namespace": "shop", "io.cilium.k8s.namespace.labels.team": "red"}
EVERYONE = [{"namespaces": {}}]


def cluster_policy(name="p", tier="Admin", priority=1, **spec):
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name},
        "spec": {"tier": tier, "priority": priority, "subject": {"namespaces": {}}} | spec,
    }


def tcp(number):
    return [{"tcp": {"destinationPort": {"number": number}}}]


def isolate(**spec):
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "np", "namespace": "shop"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]} | spec,
    }


def verdicts(policies, *ports):
    labels = [f"k8s:{key}={value}" for key, value in SHOP.items()]
    case = {
        "identities": [{"id": 1001, "labels": labels}, {"id": 1002, "labels": labels}],
        "policies": policies,
        "allow_localhost": False,
        "subjects": [{"id": 1001, "probes": [["ingress", 1002, 6, port] for port in ports]}],
    }
    result = evaluate(msgspec.convert(case, Case))
    assert all(policy.valid for policy in result.policies), result.policies
    return result.subjects[0].verdicts


def rule(action, ports=None):
    made = {"action": action, "from": EVERYONE}
    return made | ({"protocols": tcp(ports)} if ports else {})


def test_the_first_rule_that_matches_decides():
    policy = cluster_policy(ingress=[rule("Accept", 80), rule("Deny")])
    assert verdicts([policy], 80, 81) == ("allow", "deny")


def test_the_lower_priority_goes_first():
    early = cluster_policy("early", priority=1, ingress=[rule("Accept")])
    late = cluster_policy("late", priority=2, ingress=[rule("Deny")])
    assert verdicts([late, early], 80) == ("allow",)


def test_what_no_rule_speaks_of_stays_open():
    assert verdicts([cluster_policy(ingress=[rule("Deny", 80)])], 80, 81) == ("deny", "allow")


def test_admin_goes_before_network_policies_and_pass_leaves_to_them():
    policy = cluster_policy(ingress=[rule("Pass", 80), rule("Accept", 81), rule("Accept")])
    assert verdicts([policy, isolate()], 80, 81, 82) == ("deny", "allow", "allow")


def test_network_policies_are_final_for_the_isolated():
    baseline = cluster_policy(tier="Baseline", ingress=[rule("Accept")])
    assert verdicts([baseline, isolate()], 80) == ("deny",)
    assert verdicts([isolate(ingress=[{}]), cluster_policy(tier="Baseline")], 80) == ("allow",)


def test_the_baseline_decides_for_those_not_isolated():
    baseline = cluster_policy(tier="Baseline", ingress=[rule("Deny", 80)])
    assert verdicts([baseline], 80, 81) == ("deny", "allow")


def parsed(document, features=Features.ALL):
    return parse(json.dumps(document).encode(), "file", "default", features)


def test_it_is_of_its_tier_and_has_no_namespace():
    (held,) = parsed(cluster_policy(tier="Baseline")).policies
    assert held.policy.tier is Tier.BASELINE
    assert held.policy.ref.namespace == ""
    assert not held.policy.rules[0].clauses


def test_a_node_refuses_it():
    problems = parsed(cluster_policy(), Features.NODE).problems
    assert "not supported yet" in problems[0].message


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"tier": "admin"}, "did you mean 'Admin'"),
        ({"priority": 1001}, "not within 0..1000"),
        ({"subject": {}}, "either namespaces or pods"),
        ({"subject": {"pods": {"podSelector": {}}}}, "namespaceSelector is missing"),
        ({"ingress": [{"action": "Allow", "from": EVERYONE}]}, "action 'Allow' is not known"),
        ({"ingress": [{"action": "Accept"}]}, "needs 1 to 25 peers"),
        ({"ingress": [{"action": "Accept", "from": [{}]}]}, "exactly one of"),
        ({"ingress": [{"action": "Accept", "from": [{"networks": ["10.0.0.0/8"]}]}]}, "unknown"),
        ({"ingress": [rule("Deny")] * 26}, "26 entries"),
        ({"egress": [{"action": "Deny", "to": [{"domainNames": ["a.b"]}]}]}, "Accept only"),
        ({"egress": [{"action": "Deny", "to": [{"networks": ["10.0.0.1"]}]}]}, "not a prefix"),
        (
            {
                "egress": [
                    {
                        "action": "Accept",
                        "to": [{"networks": ["10.0.0.0/8"]}],
                        "protocols": [{"destinationNamedPort": "web"}],
                    }
                ]
            },
            "named ports stand with pods",
        ),
        ({"ingress": [rule("Deny") | {"protocols": tcp(0)}]}, "not within 1..65535"),
        ({"ingress": [rule("Deny") | {"protocols": [{}]}]}, "exactly one of tcp"),
    ],
)
def test_a_mistake_is_refused_with_what_would_fix_it(spec, said):
    problems = [p for p in parsed(cluster_policy(**spec)).problems if p.severity == "error"]
    assert any(said in problem.message for problem in problems), problems
