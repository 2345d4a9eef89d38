"""Which parts of the policy language a reader of manifests lets in.

What is left out is an error of the manifest, never ignored. `NODE` is what a node enforces; offline
evaluation reads `ALL`.
"""

from __future__ import annotations

from enum import Flag, auto


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
