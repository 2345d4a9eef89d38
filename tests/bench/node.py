"""A whole node to measure (tests/fakes/stack.py), with two workloads and what looks into it.

`web` is judged by the policy `base`, which lets in every identity labelled role=peer; `client` is
there to be let in by rules under measurement.
"""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from tessera_wire.identity.v1 import identity_pb2 as pb
from tessera_wire.identity.v1 import identity_pb2_grpc

from datapath.maps.layout import Endpoint, PolicyPeer, PolicyPeerKey
from datapath.maps.tables import MAPS_DIR, Tables
from tests.bench.doors import Door, Rows
from tests.fakes.netns import Namespace
from tests.fakes.stack import Stack

BASE = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: base, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress:
  - fromEndpoints: [{matchLabels: {role: peer}}]
"""
RULE = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: rule, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "PORT", protocol: TCP}]}]
"""
_SLOT_IN = struct.Struct("=8xI")


class Identities:
    """identityd over gRPC, as a node called `elsewhere`: allocating is all it does."""

    def __init__(self, stack: Stack) -> None:
        options = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
        target = f"unix://{stack.layout.socket('identityd')}"
        self._channel = grpc.insecure_channel(target, options)
        self._stub = identity_pb2_grpc.IdentityServiceStub(self._channel)
        session = self._stub.OpenSession(pb.OpenSessionRequest(node="elsewhere", ttl_s=3600))
        self._lease = session.lease
        # Bursts are larger than what one namespace may have.
        self._stub.SetLabelRules(
            pb.SetLabelRulesRequest(rules=pb.LabelRules(namespace_quota=0)), timeout=10
        )
        # Without those of the endpoints, which identityd gave at random.
        taken = {endpoint["identity"] for endpoint in stack.endpoints()}
        self._numbers = (number for number in range(1000, 65_536) if number not in taken)

    def request(self, count: int) -> tuple[pb.AllocateRequest, list[int]]:
        """Of `count` new label sets, and the numbers asked for: so rows are known beforehand."""
        numbers = list(itertools.islice(self._numbers, count))
        items = [
            pb.AllocateItem(
                labels=pb.LabelSet(
                    labels=[
                        "k8s:role=peer",
                        f"k8s:instance=i{number}",
                        "k8s:io.kubernetes.pod.namespace=shop",
                    ]
                ),
                previous=number,
            )
            for number in numbers
        ]
        return pb.AllocateRequest(node="elsewhere", lease=self._lease, items=items), numbers

    def send(self, request: pb.AllocateRequest, acked: list[float]) -> grpc.Future:
        """On its way; `acked` gets the moment of the answer."""
        future = self._stub.Allocate.future(request, timeout=60)
        future.add_done_callback(lambda _: acked.append(time.perf_counter()))
        return future

    def close(self) -> None:
        self._channel.close()


@dataclass(frozen=True, slots=True)
class BenchNode:
    stack: Stack
    rest: Door
    agent: Door
    tables: Tables
    peers: Rows
    endpoints: Rows
    web: int
    """The interface of `web`, which is its key in the table of endpoints."""
    client: int
    """The identity of `client`."""

    def slot_in(self) -> int:
        row = self.endpoints.value(struct.pack("=I", self.web))
        assert row is not None
        return int(_SLOT_IN.unpack_from(row)[0])

    def peer_key(self, identity: int) -> bytes:
        return PolicyPeerKey(self.slot_in(), identity).pack()

    def apply(self, manifest: str) -> None:
        """Done once the node has it."""
        revision = self.rest.ask("POST", "/v1/policies", manifest.encode())["revision"]
        done = self.rest.ask("GET", f"/v1/policies/wait?revision={revision}&timeout_s=30")
        assert done["done"], done


@contextmanager
def bench_node(tag: str) -> Iterator[BenchNode]:
    stack = Stack.start(f"bench-{tag}")
    spaces = [Namespace.create("tsr-bench") for _ in range(2)]
    doors: list[Door] = []
    try:
        for space, app in zip(spaces, ("web", "client"), strict=True):
            stack.add(space, app, app=app)
        doors += (Door(stack.layout.socket("apid")), Door(stack.layout.socket("agent")))
        tables = Tables.pinned(stack.bpf_dir)
        identities = {e["name"]: e["identity"] for e in stack.endpoints()}
        rows = list(tables.endpoints.items())
        maps = stack.bpf_dir / MAPS_DIR
        node = BenchNode(
            stack,
            *doors,
            tables,
            Rows(maps / "policy_peer", PolicyPeer.LAYOUT.size),
            Rows(maps / "endpoints", Endpoint.LAYOUT.size),
            next(ifindex for ifindex, row in rows if row.identity == identities["web"]),
            identities["client"],
        )
        node.apply(BASE)
        yield node
    finally:
        for door in doors:
            door.close()
        stack.stop()
        for space in spaces:
            space.delete()
