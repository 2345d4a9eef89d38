"""The public values of addresses and nodes: the JSON that ClusterMesh readers decode.

Go field names. Not every writer's fields are known, so unknown ones are let through when read;
fields that Tessera has no value for are sent empty.
"""

from __future__ import annotations

from typing import Final

from msgspec import UNSET, Struct, UnsetType, field

# Key 0: not encrypted.
_NO_ENCRYPTION: Final = 0


class AddressValue(Struct, frozen=True, omit_defaults=False):
    ip: str = field(name="IP")
    host_ip: str = field(name="HostIP")
    number: int = field(name="ID")
    mask: str | None = field(name="Mask", default=None)
    encryption_key: int = field(name="Key", default=_NO_ENCRYPTION)
    metadata: str = field(name="Metadata", default="")
    namespace: str | UnsetType = field(name="K8sNamespace", default=UNSET)
    name: str | UnsetType = field(name="K8sPodName", default=UNSET)
    uid: str | UnsetType = field(name="K8sPodUID", default=UNSET)


class NodeAddress(Struct, frozen=True, rename="pascal"):
    type: str
    ip: str = field(name="IP")


class NodeValue(Struct, frozen=True):
    """The node JSON of ClusterMesh. Fields that Tessera has no value for are sent empty, as a
    node without them would."""

    name: str = field(name="Name")
    cluster: str = field(name="Cluster")
    addresses: tuple[NodeAddress, ...] = field(name="IPAddresses")
    ipv4_cidr: None = field(name="IPv4AllocCIDR", default=None)
    ipv4_more_cidrs: None = field(name="IPv4SecondaryAllocCIDRs", default=None)
    ipv6_cidr: None = field(name="IPv6AllocCIDR", default=None)
    ipv6_more_cidrs: None = field(name="IPv6SecondaryAllocCIDRs", default=None)
    ipv4_health: str = field(name="IPv4HealthIP", default="")
    ipv6_health: str = field(name="IPv6HealthIP", default="")
    ipv4_ingress: str = field(name="IPv4IngressIP", default="")
    ipv6_ingress: str = field(name="IPv6IngressIP", default="")
    cluster_id: int = field(name="ClusterID", default=0)
    source: str = field(name="Source", default="custom-resource")
    encryption_key: int = field(name="EncryptionKey", default=0)
    labels: dict[str, str] = field(name="Labels", default_factory=dict)
    annotations: None = field(name="Annotations", default=None)
    wireguard_key: str = field(name="WireguardPubKey", default="")
    boot_id: str = field(name="BootID", default="")
