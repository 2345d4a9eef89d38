from services.policy.parse import parse
from services.policy.relevance import keys_of

MANIFEST = b"""\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: db}}
  ingress:
  - fromEndpoints:
    - matchExpressions: [{key: tier, operator: NotIn, values: [batch]}]
    - matchLabels: {"k8s:team": web}
  egress:
  - toCIDR: [10.0.0.0/8]
  - toEntities: [cluster]
"""


def test_a_policy_looks_at_the_keys_of_its_subject_and_its_peers():
    [one] = parse(MANIFEST, "test", "shop").policies
    found = keys_of(one.policy)
    assert {"app", "tier", "team", "io.kubernetes.pod.namespace"} <= found
    assert found <= {"app", "tier", "team", "io.kubernetes.pod.namespace"}


def test_what_selects_nodes_does_not_count():
    text = b"""\
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: host}
spec:
  nodeSelector: {matchLabels: {role: worker}}
  ingress: [{fromEntities: [cluster]}]
"""
    [one] = parse(text, "test", "default").policies
    assert keys_of(one.policy) == frozenset()
