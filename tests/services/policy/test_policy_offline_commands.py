"""The commands that judge policies without a server."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from services.cli.policy import app

ENDPOINTS = """
endpoints:
- {name: front, namespace: shop, labels: {app: front}}
- {name: web, namespace: shop, labels: {app: web}}
- {name: db, namespace: shop, labels: {app: db}}
"""
POLICY = """apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress:
  - fromEndpoints:
    - matchLabels: {app: front}
    toPorts:
    - ports: [{port: "8080", protocol: TCP}]
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "endpoints.yaml").write_text(ENDPOINTS)
    (tmp_path / "web.yaml").write_text(POLICY)
    (tmp_path / "wider.yaml").write_text(POLICY.replace("{app: front}", "{app: db}"))
    (tmp_path / "idle.yaml").write_text(POLICY.replace("{app: web}", "{app: nobody}"))
    (tmp_path / "bad.yaml").write_text(POLICY.replace("fromEndpoints", "fromEndpoint"))

    def call(*words):
        known = [str(tmp_path / word) if word.endswith(".yaml") else word for word in words]
        return CliRunner().invoke(app, known)

    return call


def test_explain_prints_both_ends_and_the_nearest_miss(run):
    asked = ["explain", "shop/db", "shop/web", "8080", "-f", "web.yaml"]
    found = run(*asked, "--endpoints", "endpoints.yaml")
    assert found.exit_code == 0, found.output
    assert "shop/db -> shop/web 8080/TCP: deny" in found.stdout
    assert "default deny: selected by CiliumNetworkPolicy shop/web" in found.stdout
    assert "label app=front is missing" in found.stdout
    body = json.loads(run(*asked, "--endpoints", "endpoints.yaml", "-o", "json").stdout)
    assert body["verdict"] == "deny"
    assert [end["direction"] for end in body["ends"]] == ["egress", "ingress"]


def test_matrix_lists_every_pair_and_the_world(run):
    asked = ["matrix", "-f", "web.yaml", "--endpoints", "endpoints.yaml", "--port", "8080/TCP"]
    table = json.loads(run(*asked, "-o", "json").stdout)["8080/TCP"]
    assert table["shop/front"]["shop/web"] == "allow"
    assert table["world"]["shop/web"] == "deny"
    assert table["world"]["shop/db"] == "allow"
    assert "shop/front" in run(*asked).stdout


def test_diff_tells_what_is_newly_denied_and_allowed(run):
    asked = ["diff", "--old", "web.yaml", "--new", "wider.yaml", "--endpoints", "endpoints.yaml"]
    body = json.loads(run(*asked, "--port", "8080", "-o", "json").stdout)
    assert [change["source"] for change in body["denied"]] == ["shop/front"]
    assert [change["source"] for change in body["allowed"]] == ["shop/db"]
    assert "13 of 15 connections unchanged" in run(*asked, "--port", "8080").stdout


def test_lint_names_policies_for_nobody_and_mistakes(run):
    assert run("lint", "-f", "web.yaml", "--endpoints", "endpoints.yaml").exit_code == 0
    idle = run("lint", "-f", "idle.yaml", "--endpoints", "endpoints.yaml")
    assert idle.exit_code == 1
    assert "selects no endpoint" in idle.stdout
    bad = run("lint", "-f", "bad.yaml")
    assert bad.exit_code == 1
    assert "did you mean 'fromEndpoints'?" in bad.stdout


def test_refused_policies_are_not_judged(run):
    asked = ["matrix", "-f", "bad.yaml", "--endpoints", "endpoints.yaml", "--port", "80"]
    found = run(*asked)
    assert found.exit_code == 1
    assert not found.stdout
