"""All maps of one node, typed: pinned in bpffs for the agent, in memory for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from datapath.maps.flows import CtEntry, CtKey, NatEntry, NatKey
from datapath.maps.layout import (
    ADDRESS4,
    ADDRESS6,
    METRIC_MAX,
    U32,
    Codec,
    ConfigFlags,
    ControlKey,
    Endpoint,
    IpcacheEntry,
    LocalEndpoint,
    Metric,
    Node,
    NodeConfig,
    PolicyAnswer,
    PolicyPeer,
    PolicyPeerKey,
    PolicyPortKey,
    PolicyRangeKey,
    PolicySlot,
    Prefix4,
    Prefix6,
)
from datapath.maps.table import KernelTable, MemoryTable, Table

_Row = TypeVar("_Row")


def _row(cls: Any) -> Codec[Any]:  # noqa: ANN401  one signature for every row type of layout.py
    return Codec(cls.LAYOUT.size, cls.pack, cls.unpack)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Capacity of each map; the field names are the keys of the [agent] config table."""

    endpoints_max: int = 4096
    ipcache4_max: int = 262144
    ipcache4_prefix_max: int = 65536
    ipcache6_max: int = 262144
    ipcache6_prefix_max: int = 65536
    policy_slots_max: int = 65536
    policy_peer_max: int = 1048576
    policy_port_max: int = 262144
    policy_range_max: int = 65536
    ct_max: int = 131072
    nat_max: int = 131072
    events_bytes: int = 4194304

    def of(self, name: str) -> int:
        """Entries (bytes for the ring) of the map called `name`; 0: as the object says."""
        key = CONFIG_KEYS.get(name, "")
        size: int = getattr(self, key) if key else 0
        return size


# Which key of the [agent] table sizes which map.
CONFIG_KEYS: Final = {
    "endpoints": "endpoints_max",
    "local4": "endpoints_max",
    "local6": "endpoints_max",
    "ipcache4": "ipcache4_max",
    "ipcache4_prefix": "ipcache4_prefix_max",
    "ipcache6": "ipcache6_max",
    "ipcache6_prefix": "ipcache6_prefix_max",
    "policy_slot": "policy_slots_max",
    "policy_peer": "policy_peer_max",
    "policy_port": "policy_port_max",
    "policy_range": "policy_range_max",
    "ct": "ct_max",
    "nat": "nat_max",
    "events": "events_bytes",
}

CODECS: Final[dict[str, tuple[Codec[Any], Codec[Any]]]] = {
    "endpoints": (U32, _row(Endpoint)),
    "local4": (ADDRESS4, _row(LocalEndpoint)),
    "local6": (ADDRESS6, _row(LocalEndpoint)),
    "ipcache4": (ADDRESS4, _row(IpcacheEntry)),
    "ipcache4_prefix": (_row(Prefix4), _row(IpcacheEntry)),
    "ipcache6": (ADDRESS6, _row(IpcacheEntry)),
    "ipcache6_prefix": (_row(Prefix6), _row(IpcacheEntry)),
    "nodes": (ADDRESS4, _row(Node)),
    "policy_slot": (U32, _row(PolicySlot)),
    "policy_peer": (_row(PolicyPeerKey), _row(PolicyPeer)),
    "policy_port": (_row(PolicyPortKey), _row(PolicyAnswer)),
    "policy_range": (_row(PolicyRangeKey), _row(PolicyAnswer)),
    "control": (_row(ControlKey), U32),
    "ct": (_row(CtKey), _row(CtEntry)),
    "nat": (_row(NatKey), _row(NatEntry)),
    "masquerade_exclude4": (_row(Prefix4), U32),
    "metrics": (U32, _row(Metric)),
    "config": (U32, _row(NodeConfig)),
}

# Rows of an array all exist; these are what untouched ones read as.
_ARRAYS: Final[dict[str, tuple[int, Any]]] = {
    "policy_slot": (0, PolicySlot(0)),
    "metrics": (METRIC_MAX, Metric(0, 0)),
    "config": (1, NodeConfig(ConfigFlags(0), 0)),
}

MAPS_DIR: Final = "maps2"


@dataclass(frozen=True, slots=True)
class Tables:
    """`endpoints` by ifindex; `local4`, `ipcache4` by address; `policy_slot` by slot;
    `metrics` by reason * 2 + direction - 1; `config` has the one key 0."""

    endpoints: Table[int, Endpoint]
    local4: Table[int, LocalEndpoint]
    local6: Table[int, LocalEndpoint]
    ipcache4: Table[int, IpcacheEntry]
    ipcache4_prefix: Table[Prefix4, IpcacheEntry]
    ipcache6: Table[int, IpcacheEntry]
    ipcache6_prefix: Table[Prefix6, IpcacheEntry]
    nodes: Table[int, Node]
    policy_slot: Table[int, PolicySlot]
    policy_peer: Table[PolicyPeerKey, PolicyPeer]
    policy_port: Table[PolicyPortKey, PolicyAnswer]
    policy_range: Table[PolicyRangeKey, PolicyAnswer]
    control: Table[ControlKey, int]
    ct: Table[CtKey, CtEntry]
    nat: Table[NatKey, NatEntry]
    masquerade_exclude4: Table[Prefix4, int]
    metrics: Table[int, Metric]
    config: Table[int, NodeConfig]

    @classmethod
    def memory(cls, sizes: Sizes | None = None) -> Self:
        sizes = sizes or Sizes()

        def table(name: str) -> MemoryTable[Any, Any]:
            key, value = CODECS[name]
            fixed, zero = _ARRAYS.get(name, (0, None))
            return MemoryTable(
                name,
                key,
                value,
                max_entries=fixed or sizes.of(name),
                config_key=CONFIG_KEYS.get(name, ""),
                zero=zero,
            )

        return cls(**{name: table(name) for name in CODECS})

    @classmethod
    def pinned(cls, bpf_dir: Path) -> Self:
        """The maps an agent pinned under `bpf_dir`; NotFound where none has."""

        def table(name: str) -> KernelTable[Any, Any]:
            key, value = CODECS[name]
            path = bpf_dir / MAPS_DIR / name
            return KernelTable.open(path, key, value, CONFIG_KEYS.get(name, ""))

        return cls(**{name: table(name) for name in CODECS})

    def close(self) -> None:
        """Releases the kernel maps' descriptors; what is in them stays."""
        for name in CODECS:
            table = getattr(self, name)
            if isinstance(table, KernelTable):
                table.close()
