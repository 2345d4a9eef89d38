"""Keys and values as nodes, identityd and policyd write them."""

from __future__ import annotations

import json

from identity.keys import ID_PREFIX, IP_PREFIX, NODES_PREFIX
from identity.labels import Labels
from services.policy.clauses import PolicyRef
from services.policy.parse import parse
from services.policy.resolve import rule_count
from services.policyd.records import PolicyRecord, decode, encode
from services.policyd.records import object_key as object_key

Item = tuple[str, bytes]


def pod(app: str, namespace: str = "shop", **more: str) -> Labels:
    return Labels.parse(
        [
            *(f"k8s:{key}={value}" for key, value in more.items()),
            f"k8s:app={app}",
            f"k8s:io.kubernetes.pod.namespace={namespace}",
            "k8s:io.cilium.k8s.policy.cluster=default",
        ]
    )


def identity(number: int, labels: Labels) -> Item:
    return f"{ID_PREFIX}{number}", labels.canonical().encode()


def address(ip: str, number: int, host_ip: str = "192.0.2.1", name: str = "p") -> Item:
    entry = {
        "IP": ip,
        "Mask": None,
        "HostIP": host_ip,
        "ID": number,
        "Key": 0,
        "Metadata": "",
        "K8sNamespace": "shop",
        "K8sPodName": name,
    }
    return f"{IP_PREFIX}{ip}", json.dumps(entry).encode()


def node(name: str, ip: str = "192.0.2.1") -> Item:
    entry = {"Name": name, "Cluster": "default", "IPAddresses": [{"Type": "InternalIP", "IP": ip}]}
    return f"{NODES_PREFIX}default/{name}", json.dumps(entry).encode()


def policy(manifest: str, rule_base: int, traceparent: str = "") -> Item:
    (parsed,) = parse(manifest.encode(), "test", "default").policies
    record = PolicyRecord(
        manifest=manifest,
        rule_base=rule_base,
        rule_count=rule_count(parsed.policy),
        traceparent=traceparent,
    )
    return object_key(parsed.policy.ref), encode(record)


def ref(name: str, namespace: str = "shop") -> PolicyRef:
    return PolicyRef("CiliumNetworkPolicy", namespace, name)


def allow(name: str, subject: str, peer: str, port: int = 80, namespace: str = "shop") -> str:
    """`subject` may be reached by `peer` on `port`."""
    return f"""\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  endpointSelector: {{matchLabels: {{app: {subject}}}}}
  ingress:
  - fromEndpoints:
    - matchLabels: {{app: {peer}}}
    toPorts: [{{ports: [{{port: "{port}", protocol: TCP}}]}}]
"""


def to_cidr(name: str, subject: str, cidr: str, *, but: str = "") -> str:
    """`subject` may reach `cidr`, without `but`."""
    excepts = f", except: [{but}]" if but else ""
    return f"""\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: {name}, namespace: shop}}
spec:
  endpointSelector: {{matchLabels: {{app: {subject}}}}}
  egress:
  - toCIDRSet: [{{cidr: {cidr}{excepts}}}]
"""


def manifest_of(record: bytes) -> str:
    return decode(record).manifest
