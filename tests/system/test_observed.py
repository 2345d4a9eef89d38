"""What the node tells its operators: one trace per change, metrics of every process."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from tests.fakes.netns import namespace
from tests.fakes.stack import Stack, eventually, free_port

pytestmark = pytest.mark.kernel

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
POLICY = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
  ingress:
  - fromEntities: [host]
"""


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP/gRPC endpoint that keeps (service, span name, parent span, span id) of one trace."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, str, str]] = []
        self._lock = threading.Lock()

    def Export(self, request, context):
        with self._lock:
            for resource in request.resource_spans:
                attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans += [
                        (
                            attributes["service.name"],
                            span.name,
                            span.parent_span_id.hex(),
                            span.span_id.hex(),
                        )
                        for span in scope.spans
                        if span.trace_id.hex() == TRACE
                    ]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, int]]:
    made = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield made, port
    server.stop(0).wait()


def test_one_trace_leads_from_the_request_to_the_write_of_the_map(
    collector: tuple[Collector, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    spans, port = collector
    stack = Stack.start("trace", {"telemetry": {"otlp_endpoint": f"127.0.0.1:{port}"}})
    try:
        with namespace() as api:
            stack.add(api, "api", app="api")
            stack.rest.request(
                "POST",
                "/v1/policies",
                body=POLICY.encode(),
                headers={"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"},
            )
            eventually(
                lambda: any(name == "maps.write" for _, name, _, _ in spans.spans),
                f"no span of the map write among {spans.spans}",
            )
            eventually(
                lambda: {"tessera-apid", "tessera-policyd"} <= {one[0] for one in spans.spans},
                f"a process is missing among {spans.spans}",
            )
    finally:
        stack.stop()
    by_id = {span_id: (service, name, parent) for service, name, parent, span_id in spans.spans}
    chain = []
    at = next(one[3] for one in spans.spans if one[1] == "maps.write")
    while at in by_id:
        service, name, at = by_id[at]
        chain.append((service, name))
    assert chain[0] == ("tessera-agent", "maps.write")
    assert ("tessera-agent", "agent.realise") in chain
    assert ("tessera-policyd", "policyd.resolve") in chain
    assert chain[-1][0] == "tessera-apid"
    assert at == "00f067aa0ba902b7"


def test_every_process_answers_with_its_metrics() -> None:
    ports = {name: free_port() for name in ("identityd", "ipamd", "policyd", "agent")}
    listens = {name: {"metrics_listen": f"127.0.0.1:{port}"} for name, port in ports.items()}
    stack = Stack.start("metrics", listens)
    try:
        pages = {"apid": stack.rest.get("/metrics").decode()}
        for name, port in ports.items():
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
                pages[name] = reply.read().decode()
    finally:
        stack.stop()
    own = {"identityd": "tessera_identity_", "ipamd": "tessera_ipam_"}
    for name, page in pages.items():
        assert own.get(name, f"tessera_{name}_") in page, page
