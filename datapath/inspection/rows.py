"""What a row of each map is to a reader: numbers and addresses spelled, nothing interpreted.

Every struct is one line of JSON on the way to whoever asked; the field names are the contract.
"""

from __future__ import annotations

from msgspec import Struct


class EndpointRow(Struct, frozen=True):
    """`interface` empty: the kernel has none with that index any more. `address6` empty: it has
    none. `slot_...` 0: open."""

    id: int
    interface: str
    ifindex: int
    address: str
    address6: str
    identity: int
    slot_in: int
    slot_out: int
    flags: tuple[str, ...]
    mac: str
    host_mac: str


class PolicyRow(Struct, frozen=True):
    """One answer of one slot. `peers`: the identities it answers; empty: everyone without a row of
    their own. `ports`: "any", "80", "8080-8095"; of ICMP the type. `endpoints`: ids of those that
    are judged by the slot; none: nobody is."""

    slot: int
    direction: str
    endpoints: tuple[int, ...]
    peers: tuple[int, ...]
    proto: str
    ports: str
    verdict: str
    rule: int
    proxy_port: int
    class_id: int
    revision: int


class IpcacheRow(Struct, frozen=True):
    """`tunnel`: the node to encapsulate to; empty: local, or routed as it is."""

    cidr: str
    identity: int
    tunnel: str


class JudgeRow(Struct, frozen=True):
    """What one side said when it last judged. Only an allow is ever kept."""

    verdict: str
    rule: int
    slot: int
    revision: int
    proxy_port: int


class ConnectionRow(Struct, frozen=True):
    """Source is who began. `packets`, `octets`: forward, reply. ICMP echo: the asker's port is the
    id, the other's 8. `idle_s`: since the last packet of either direction."""

    proto: str
    source: str
    source_port: int
    destination: str
    destination_port: int
    source_identity: int
    destination_identity: int
    state: tuple[str, ...]
    packets: tuple[int, int]
    octets: tuple[int, int]
    idle_s: float
    ingress: JudgeRow | None
    egress: JudgeRow | None


class TalkerRow(Struct, frozen=True):
    """A connection and what it moved per second, both directions together."""

    connection: ConnectionRow
    packets_per_s: float
    octets_per_s: float


class MetricRow(Struct, frozen=True):
    """`reason` 0: forwarded. Since the maps were made."""

    reason: int
    name: str
    direction: str
    packets: int
    octets: int


class MapRow(Struct, frozen=True):
    """`fill`: share of `max_entries` in use, 0 to 1."""

    name: str
    entries: int
    max_entries: int
    fill: float


class FindingRow(Struct, frozen=True):
    """A row that does not fit to the others. `wanted`, `found`: empty where there is no row."""

    table: str
    key: str
    wanted: str
    found: str


class CountRow(Struct, frozen=True):
    count: int


Row = (
    EndpointRow
    | PolicyRow
    | IpcacheRow
    | ConnectionRow
    | TalkerRow
    | MetricRow
    | MapRow
    | FindingRow
    | CountRow
)
