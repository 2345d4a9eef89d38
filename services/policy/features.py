"""Which parts of the policy language a reader of manifests lets in, and in whose reading.

What is left out is an error of the manifest, never ignored. `NODE` is what a node enforces; offline
evaluation reads `ALL`.
"""

from __future__ import annotations

from enum import Enum, Flag, auto


class Dialect(Enum):
    """Where Cilium 1.17 reads a manifest otherwise than it says, or than Kubernetes means.

    CILIUM_1_17 serves to judge what was recorded with it; nothing is admitted in it. It differs in:
    deny clauses are not checked (what is wrong in them chooses nobody, two peer fields are their
    union); ICMP type 0 of IPv4 is every type; a namespaceSelector of NotIn or DoesNotExist alone
    also chooses what has no namespace, the world and the host; unknown fields are passed over.
    """

    TESSERA = "tessera"
    CILIUM_1_17 = "cilium-1.17"


class Features(Flag):
    NODE = 0  # endpoints, entities, CIDRs; port numbers and ICMP types; allow and deny
    NAMED_PORTS = auto()
    L7 = auto()  # HTTP, Kafka, DNS and generic rules
    TLS = auto()  # server names, termination, origination
    LISTENERS = auto()
    AUTHENTICATION = auto()
    FQDNS = auto()
    SERVICES = auto()
    CLOUD_GROUPS = auto()
    NODES = auto()  # peers by node label
    CIDR_GROUPS = auto()
    REQUIREMENTS = auto()  # fromRequires and toRequires
    TIERS = auto()  # ClusterNetworkPolicy
    ALL = (
        NAMED_PORTS
        | L7
        | TLS
        | LISTENERS
        | AUTHENTICATION
        | FQDNS
        | SERVICES
        | CLOUD_GROUPS
        | NODES
        | CIDR_GROUPS
        | REQUIREMENTS
        | TIERS
    )
