"""Agents killed and programs exchanged on two nodes while packets between them are counted.

TESSERA_RESTARTS: how many agents are killed, one after the other; a program upgrade comes on top.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from services.cli import layout
from tests.fakes.cluster import Cluster, ClusterNode, Pod
from tests.fakes.kernel_node import changed_build
from tests.fakes.traffic import Connections, UdpStream

pytestmark = pytest.mark.kernel

RESTARTS = int(os.environ.get("TESSERA_RESTARTS", "2"))
POLICY = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: db}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "80", protocol: TCP}, {port: "5000", protocol: UDP}]}]
"""


def upgrade(node: ClusterNode, folder: Path) -> None:
    """The next agent of the node brings programs of its own."""
    built = changed_build(folder, {"conntrack.h": ("TCP_CLOSING_S 10", "TCP_CLOSING_S 11")})
    tables: Any = tomllib.loads(node.config_file.read_text())
    tables["agent"]["bpf_object"] = str(built)
    node.config_file.write_text(layout.dump(tables))


@pytest.mark.timeout(120 + 60 * RESTARTS)
def test_restarts_and_an_upgrade_lose_no_allowed_packet_and_pass_no_other(
    cluster: Cluster, tmp_path: Path
) -> None:
    one, two = cluster.nodes
    client: Pod = cluster.add_pod(one, "client", app="client")
    stranger: Pod = cluster.add_pod(one, "stranger", app="stranger")
    db: Pod = cluster.add_pod(two, "db", app="db")
    cluster.settled()
    cluster.apply(POLICY)
    with (
        UdpStream(client.ns, db.ns, db.ip, 5000) as allowed,
        UdpStream(stranger.ns, db.ns, db.ip, 5001) as forbidden,
        UdpStream(client.ns, db.ns, db.ip, 5002) as other_port,
        Connections(client.ns, db.ns, db.ip, 80) as connections,
    ):
        for number in range(RESTARTS):
            cluster.nodes[number % 2].restart()
        upgrade(two, tmp_path)
        two.restart()
    assert "changed=0" not in two.log().rpartition("agent.took_over")[2].partition("\n")[0]
    assert (allowed.lost, connections.failed) == (0, [])
    assert min(allowed.sent, forbidden.sent, other_port.sent) > 500 * RESTARTS
    assert connections.made > 20 * RESTARTS
    assert not forbidden.received
    assert not other_port.received
