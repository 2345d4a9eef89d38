"""The rows of `tessera bpf` as tables show them; datapath/inspection/rows.py is where they come
from. Fields a newer reader adds are passed over."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from services.cli.kernel import Names, identity_text

_PEERS_TOLD = 6


class Endpoint(Struct, frozen=True):
    id: int
    interface: str
    address: str
    identity: int
    slot_in: int
    slot_out: int
    flags: tuple[str, ...]
    ifindex: int
    address6: str = ""


ENDPOINT_HEAD = ("ENDPOINT", "INTERFACE", "ADDRESS", "IDENTITY", "INGRESS", "EGRESS", "FLAGS")


def endpoint(row: Endpoint, names: Names) -> Sequence[str]:
    return (
        names.endpoint(row.id),
        row.interface or f"gone ({row.ifindex})",
        ",".join(filter(None, (row.address, row.address6))),
        identity_text(row.identity),
        _slot(row.slot_in),
        _slot(row.slot_out),
        ",".join(row.flags) or "-",
    )


def _slot(number: int) -> str:
    return f"slot {number}" if number else "open"


class Policy(Struct, frozen=True):
    slot: int
    direction: str
    endpoints: tuple[int, ...]
    peers: tuple[int, ...]
    proto: str
    ports: str
    verdict: str
    rule: int


POLICY_HEAD = ("SLOT", "DIRECTION", "ENDPOINTS", "PEERS", "PORTS", "VERDICT", "RULE")


def policy(row: Policy, names: Names) -> Sequence[str]:
    verdict = "DENY" if row.verdict == "none" else row.verdict.upper()
    return (
        str(row.slot),
        row.direction or "unused",
        _some([names.endpoint(one) for one in row.endpoints]),
        _some([identity_text(one) for one in row.peers]) if row.peers else "everyone else",
        "any" if row.proto == "any" else f"{row.ports}/{row.proto}",
        verdict,
        "default deny" if row.verdict == "none" else names.rule(row.rule),
    )


def _some(words: Sequence[str]) -> str:
    more = len(words) - _PEERS_TOLD
    told = ",".join(words[:_PEERS_TOLD]) or "-"
    return f"{told} and {more:,} more" if more > 0 else told


class Ipcache(Struct, frozen=True):
    cidr: str
    identity: int
    tunnel: str = ""


IPCACHE_HEAD = ("ADDRESS", "IDENTITY", "TUNNEL")


def ipcache(row: Ipcache) -> Sequence[str]:
    return (row.cidr, identity_text(row.identity), row.tunnel or "-")


class Judge(Struct, frozen=True):
    rule: int


class Connection(Struct, frozen=True):
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
    ingress: Judge | None = None
    egress: Judge | None = None

    @property
    def ends(self) -> tuple[str, str]:
        return (
            f"{_at(self.source, self.source_port)} ({self.source_identity})",
            f"{_at(self.destination, self.destination_port)} ({self.destination_identity})",
        )


CONNECTION_HEAD = (
    "PROTO", "SOURCE", "DESTINATION", "PACKETS", "BYTES", "IDLE", "STATE", "RULES",
)  # fmt: skip


def connection(row: Connection, names: Names) -> Sequence[str]:
    rules = [
        f"{way} {names.rule(judge.rule)}"
        for way, judge in (("egress", row.egress), ("ingress", row.ingress))
        if judge is not None
    ]
    return (
        row.proto,
        *row.ends,
        "/".join(map(str, row.packets)),
        "/".join(map(str, row.octets)),
        f"{row.idle_s:.0f}s",
        " ".join(row.state) or "-",
        "; ".join(rules) or "-",
    )


def _at(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class Talker(Struct, frozen=True):
    connection: Connection
    packets_per_s: float
    octets_per_s: float


TALKER_HEAD = ("BYTES/S", "PACKETS/S", "PROTO", "SOURCE", "DESTINATION")


def talker(row: Talker) -> Sequence[str]:
    found = row.connection
    return (f"{row.octets_per_s:,.0f}", f"{row.packets_per_s:,.0f}", found.proto, *found.ends)


class Count(Struct, frozen=True):
    count: int


class Metric(Struct, frozen=True):
    name: str
    direction: str
    packets: int
    octets: int
    reason: int = 0


METRIC_HEAD = ("REASON", "NUMBER", "DIRECTION", "PACKETS", "BYTES")


def metric(row: Metric) -> Sequence[str]:
    number = str(row.reason) if row.reason else "-"
    return (row.name, number, row.direction or "-", str(row.packets), str(row.octets))


class Map(Struct, frozen=True):
    name: str
    entries: int
    max_entries: int
    fill: float


MAP_HEAD = ("MAP", "ENTRIES", "ROOM", "FILL")


def map_(row: Map) -> Sequence[str]:
    return (row.name, str(row.entries), str(row.max_entries), f"{row.fill:.1%}")


class Finding(Struct, frozen=True):
    table: str
    key: str
    wanted: str
    found: str


FINDING_HEAD = ("TABLE", "ROW", "WANTED", "FOUND")


def finding(row: Finding) -> Sequence[str]:
    return (row.table, row.key, row.wanted or "no row", row.found or "no row")


class Report(Struct, frozen=True):
    rows: dict[str, int]
    different: int
    differences: tuple[Finding, ...]
    repaired: bool = False
    unconfirmed: bool = False
