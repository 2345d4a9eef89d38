"""One endpoint of this node: what was asked for, and what it was given."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from ipaddress import IPv6Address

from datapath.agent.addresses import dotted
from datapath.maps.layout import Endpoint, EndpointFlags
from identity.numbers import NumericIdentity

OUTER_PREFIX = "tes"
NO_IDENTITY = NumericIdentity(0)
# Of an endpoint whose labels nobody has told yet; alone in its set.
INIT_LABELS = ("reserved:init",)
NAMESPACE_LABEL = "k8s:io.kubernetes.pod.namespace"


class State(Enum):
    CREATING = "creating"
    READY = "ready"
    RELEASING = "releasing"
    """Gone from this node; the control plane, away at the time, has yet to be told."""


@dataclass(frozen=True, slots=True)
class EndpointRecord:
    """`outer`: the host side of the pair. While CREATING the fields from `identity` to `host_mac`
    are unset. `address6`: 0 when its pool has no IPv6. `container`, `network`: of the runtime that
    asked for it by CNI, else empty. `mtu` 0: what links.py gives. `routes`: CIDRs its namespace
    reaches through it; none: everything. `pool`: of addresses; empty: by namespace. `static`: the
    addresses asked for. `retain_s`: how long they are kept for it once it is gone. `adopted`:
    interface and address were there before, and stay when it is deleted."""

    id: int
    namespace: str
    name: str
    labels: tuple[str, ...]
    netns: str
    interface: str
    outer: str
    state: State
    identity: NumericIdentity = NO_IDENTITY
    address: int = 0
    address6: int = 0
    ifindex: int = 0
    mac: bytes = bytes(6)
    host_mac: bytes = bytes(6)
    container: str = ""
    network: str = ""
    mtu: int = 0
    routes: tuple[str, ...] = ()
    pool: str = ""
    static: tuple[str, ...] = ()
    retain_s: int = 0
    adopted: bool = False

    @property
    def key(self) -> tuple[str, str]:
        return (self.namespace, self.name)

    @property
    def ref(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def ip(self) -> str:
        return dotted(self.address)

    @property
    def ip6(self) -> str:
        """Empty: it has none."""
        return str(IPv6Address(self.address6)) if self.address6 else ""

    @property
    def ips(self) -> tuple[str, ...]:
        """Its addresses, IPv4 first."""
        return (self.ip, self.ip6) if self.address6 else (self.ip,)

    def row(self) -> Endpoint:
        """Slots are the enforcement's to fill in."""
        return Endpoint(
            self.id,
            self.identity,
            0,
            0,
            EndpointFlags.READY,
            self.address,
            self.mac,
            self.host_mac,
            self.address6,
        )


def outer_name(node: str, namespace: str, name: str) -> str:
    """15 characters, the most an interface name may have. The same again for the same endpoint, so
    that what a killed agent left behind is found by name; the node is in it because several nodes
    may share one machine."""
    text = f"{node}/{namespace}/{name}".encode()
    return OUTER_PREFIX + blake2b(text, digest_size=6).hexdigest()


def identity_labels(namespace: str, labels: tuple[str, ...]) -> tuple[str, ...]:
    """With the namespace's label, which policies select by, when it was not given."""
    if labels == INIT_LABELS:
        return labels
    own = f"{NAMESPACE_LABEL}={namespace}"
    given = any(label.split("=", 1)[0] == NAMESPACE_LABEL for label in labels)
    return tuple(sorted({*labels} if given else {*labels, own}))
