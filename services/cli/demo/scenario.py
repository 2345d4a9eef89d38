"""Who takes part in the demo, what they send each other, and what each connection should meet.

partner/outsider ──✗──► shop/frontend ──► shop/api ──► shop/db ◄──✗── host
                                            ▲ │
                              198.51.100.10 ┘ └► 198.51.100.10:9000      (.66 ✗)

default/web ◄──► default/worker      every pod ──► infra-istio/gateway:8443
vmagent-system/vmagent ──► desired-namespace/exporter
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from importlib import resources

from services.cli.manifests import Manifest
from services.cli.views import PolicyName

HOST = "host"
# TEST-NET-2 (RFC 5737): nobody's real network.
OUTSIDE_GATEWAY = "198.51.100.1"
STATION = "198.51.100.10"
STRANGER = "198.51.100.66"
OUTSIDE_PREFIX = 24

# Marks what the demo made, so that a leftover is told from somebody else's object.
MARK = "k8s:app.kubernetes.io/part-of=tessera-demo"
AUTHOR = "tessera-demo"


class Seen(StrEnum):
    FORWARDED = "FORWARDED"
    DROPPED = "DROPPED"
    REFUSED = "REFUSED"  # reached a host that does not listen: the policy let it pass
    UNREACHABLE = "UNREACHABLE"


@dataclass(frozen=True, slots=True)
class Workload:
    namespace: str
    name: str
    label: str
    tcp: tuple[int, ...] = ()
    udp: tuple[int, ...] = ()

    @property
    def ref(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.label, MARK)


@dataclass(frozen=True, slots=True)
class Probe:
    """`source`, `target`: a workload's ref, HOST, STATION or STRANGER. `port` 0 for ICMP."""

    source: str
    target: str
    port: int
    proto: str
    expected: Seen


WORKLOADS = (
    Workload("shop", "frontend", "k8s:app=frontend", tcp=(8080,)),
    Workload("shop", "api", "k8s:app=api", tcp=(8080, 8081, 9090), udp=(8125,)),
    Workload("shop", "db", "k8s:app=db", tcp=(5432,)),
    Workload("partner", "outsider", "k8s:app=outsider"),
    Workload("default", "web", "k8s:app=web"),
    Workload("default", "worker", "k8s:app=worker", tcp=(8080,)),
    Workload("infra-istio", "gateway", "k8s:app=gateway", tcp=(8443, 9443)),
    Workload(
        "vmagent-system",
        "vmagent",
        "k8s:io.cilium.k8s.policy.serviceaccount=victoria-metrics-agent-usr",
        tcp=(8429,),
    ),
    Workload("desired-namespace", "exporter", "k8s:app=exporter", tcp=(9100,)),
)
STATION_TCP = (9000,)

_PASS, _DROP = Seen.FORWARDED, Seen.DROPPED
PROBES = (
    # Three tiers. The answers come back although frontend and api accept nothing from each other's
    # tier: replies of a tracked connection are not judged again, a new connection is.
    Probe("shop/frontend", "shop/api", 8080, "TCP", _PASS),
    Probe("shop/api", "shop/db", 5432, "TCP", _PASS),
    Probe("shop/api", "shop/frontend", 8080, "TCP", _DROP),
    Probe("shop/frontend", "shop/db", 5432, "TCP", _DROP),
    Probe("partner/outsider", "shop/api", 8080, "TCP", _DROP),
    Probe("shop/frontend", "shop/api", 9090, "TCP", _DROP),
    Probe("shop/frontend", "shop/api", 8125, "UDP", _PASS),
    Probe("partner/outsider", "shop/api", 8125, "UDP", _DROP),
    Probe("shop/frontend", "shop/db", 0, "ICMP", _PASS),
    Probe("partner/outsider", "shop/db", 0, "ICMP", _DROP),
    # The local host, and the world outside by address.
    Probe(HOST, "shop/api", 8080, "TCP", _PASS),
    Probe(HOST, "shop/db", 5432, "TCP", _DROP),
    Probe(STATION, "shop/api", 8080, "TCP", _PASS),
    Probe(STRANGER, "shop/api", 8080, "TCP", _DROP),
    Probe("shop/api", STATION, 9000, "TCP", _PASS),
    Probe("shop/frontend", STATION, 9000, "TCP", _DROP),
    # 01-all-pods-to-istio: isolates every pod's egress but for the gateway's 8443.
    Probe("default/web", "infra-istio/gateway", 8443, "TCP", _PASS),
    Probe("default/web", "infra-istio/gateway", 9443, "TCP", _DROP),
    # 02-allow-within-namespace, in `default`: both ways inside, nothing in from elsewhere.
    Probe("default/web", "default/worker", 8080, "TCP", _PASS),
    Probe("partner/outsider", "default/worker", 8080, "TCP", _DROP),
    Probe("default/worker", "shop/api", 8080, "TCP", _DROP),
    # 03-vmagent-allow-desired-namespace: one service account, one namespace, one way.
    Probe("vmagent-system/vmagent", "desired-namespace/exporter", 9100, "TCP", _PASS),
    Probe("vmagent-system/vmagent", "infra-istio/gateway", 8443, "TCP", _PASS),
    Probe("desired-namespace/exporter", "vmagent-system/vmagent", 8429, "TCP", _DROP),
    Probe("partner/outsider", "desired-namespace/exporter", 9100, "TCP", _PASS),
)

# Opened before STREAM_POLICY is deleted, used again afterwards.
STREAM = Probe("shop/frontend", "shop/api", 8081, "TCP", _PASS)
STREAM_CUT = Probe("shop/frontend", "shop/api", 8081, "TCP", _DROP)
STREAM_POLICY = PolicyName("CiliumNetworkPolicy", "api-stream", "shop")


# Where a manifest that names no namespace is applied, if not in `default`: a namespaced policy
# chooses among the workloads of its own namespace, whatever its selector says.
NAMESPACES = {"03-vmagent-allow-desired-namespace.yaml": "vmagent-system"}


def manifests() -> dict[str, tuple[Manifest, ...]]:
    """The policies by the namespace to apply them in, each in the order of file names."""
    folder = resources.files(__package__) / "policies"
    grouped: dict[str, list[Manifest]] = {}
    for file in sorted(folder.iterdir(), key=lambda one: one.name):
        namespace = NAMESPACES.get(file.name, "default")
        grouped.setdefault(namespace, []).append(Manifest(file.name, file.read_bytes()))
    return {namespace: tuple(files) for namespace, files in grouped.items()}
