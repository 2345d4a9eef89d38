"""The whole control plane as processes, and schemathesis against the document it serves: no answer
that the document does not list, none that does not fit its schema, no 5xx."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tessera_wire.identity.v1 import identity_pb2 as pb
from tessera_wire.identity.v1 import identity_pb2_grpc

from tests.fakes.stack import ControlPlane, eventually, free_port

SEED = 20
# Of each operation, beside one for each boundary of its parameters.
EXAMPLES = 2
BOUND_S = 200.0
# Streams end when the client does; their own tests read them (test_apid_stream.py).
STREAMS = r"/(watch|events)$"
# A schema cannot say which texts are selectors or manifests, so what fits it may be refused.
NOT_CHECKED = "positive_data_acceptance"

POLICIES = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: db}}
  ingress: [{fromEndpoints: [{matchLabels: {app: web}}]}]
---
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: all}
spec: {endpointSelector: {}, egress: [{toEntities: [all]}]}
"""


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    made = ControlPlane.start("doc", {"apid": {"listen": f"127.0.0.1:{free_port()}"}})
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def populated(plane: ControlPlane) -> ControlPlane:
    """With something in every list that needs no agent."""
    plane.rest.request("POST", "/v1/policies", body=POLICIES.encode())
    with grpc.insecure_channel(f"unix://{plane.layout.socket('identityd')}") as channel:
        stub = identity_pb2_grpc.IdentityServiceStub(channel)
        session = stub.OpenSession(
            pb.OpenSessionRequest(node="n1", ttl_s=300, internal_ip="192.0.2.1")
        )
        labels = [
            [f"k8s:app={app}", "k8s:io.kubernetes.pod.namespace=shop"] for app in ("web", "db")
        ]
        items = [pb.AllocateItem(labels=pb.LabelSet(labels=each)) for each in labels]
        found = stub.Allocate(pb.AllocateRequest(node="n1", lease=session.lease, items=items))
        announced = [
            pb.Announcement(
                ip=f"10.0.0.{at}", identity=result.identity, host_ip="192.0.2.1",
                namespace="shop", name=f"pod-{at}",
            )
            for at, result in enumerate(found.results, 1)
        ]  # fmt: skip
        stub.Announce(pb.AnnounceRequest(node="n1", lease=session.lease, items=announced))
    eventually(lambda: json.loads(plane.rest.get("/v1/identities/stats"))["addresses"] == 2, "both")
    return plane


@pytest.mark.timeout(240)
def test_nothing_is_answered_that_the_document_does_not_say(
    populated: ControlPlane, tmp_path: Path
) -> None:
    document = json.loads(populated.rest.get("/v1/openapi.json"))
    operations = sum(
        len(on) for path, on in document["paths"].items() if not re.search(STREAMS, path)
    )
    # Waiting as long as a caller may ask for would be most of the run.
    (tmp_path / "schemathesis.toml").write_text(
        '[[operations]]\ninclude-path = "/v1/policies/wait"\n'
        'parameters = { "query.timeout_s" = 0.01 }\n'
    )
    run = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run",
            f"{populated.rest.address}/v1/openapi.json",
            "--exclude-path-regex", STREAMS, "--exclude-checks", NOT_CHECKED,
            "--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES),
            "--seed", str(SEED), "--suppress-health-check", "all", "--warnings", "off",
            "--request-timeout", "10",
        ],
        cwd=tmp_path, capture_output=True, check=False, timeout=BOUND_S, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    tested = re.search(r"Tested: (\d+)", run.stdout)
    assert tested, run.stdout
    assert int(tested[1]) == operations
