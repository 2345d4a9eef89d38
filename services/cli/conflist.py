"""The network configuration that makes a runtime call the plugin, and what stands in its way.

Runtimes of Kubernetes take the first file of the folder by name; podman takes networks by their
name, whatever file they are in. So a file before ours, or another network of our name, would leave
containers without policy while everything looks installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

PLUGIN = "tessera"
# The newest that containerd 1.6 and podman 4.3 speak; the plugin answers in whatever is asked.
SPEC_VERSION = "1.0.0"
SUFFIXES = (".conf", ".conflist", ".json")
# Of chained plugins, which have nothing to do unless the runtime passes them these.
CAPABILITIES: Mapping[str, str] = {"portmap": "portMappings", "bandwidth": "bandwidth"}
OWN_CAPABILITIES = ("labels", "ips", "mac", "io.kubernetes.cri.pod-annotations")


@dataclass(frozen=True, slots=True)
class Network:
    """`mtu` 0: the plugin's own. `namespace`: of containers that no runtime puts into one."""

    name: str
    chain: Sequence[str] = ()
    mtu: int = 0
    namespace: str = "default"
    labels: Mapping[str, str] = field(default_factory=dict)


def conflist(network: Network) -> bytes:
    ours: dict[str, object] = {
        "type": PLUGIN,
        "namespace": network.namespace,
        "capabilities": dict.fromkeys(OWN_CAPABILITIES, True),
    }
    if network.mtu:
        ours["mtu"] = network.mtu
    if network.labels:
        ours["labels"] = dict(network.labels)
    document = {
        "cniVersion": SPEC_VERSION,
        "name": network.name,
        "plugins": [ours, *map(_chained, network.chain)],
    }
    return json.dumps(document, indent=2).encode() + b"\n"


def _chained(plugin: str) -> dict[str, object]:
    capability = CAPABILITIES.get(plugin)
    return {"type": plugin} | ({"capabilities": {capability: True}} if capability else {})


@dataclass(frozen=True, slots=True)
class Found:
    """A file of the folder. `types`: of its plugins; empty for what is no configuration."""

    file: str
    network: str
    types: tuple[str, ...]

    @property
    def ours(self) -> bool:
        return PLUGIN in self.types


def read(file: str, content: bytes) -> Found:
    try:
        document = json.loads(content)
        plugins = document.get("plugins", [document])
        types = tuple(str(plugin["type"]) for plugin in plugins)
        return Found(file, str(document.get("name", "")), types)
    except (ValueError, AttributeError, TypeError, KeyError):
        return Found(file, "", ())


def is_configuration(file: str) -> bool:
    return PurePath(file).suffix in SUFFIXES


def obstacles(file: str, network: str, others: Sequence[Found]) -> Iterator[str]:
    """Why runtimes would not use `file`; `others`: the folder's configurations."""
    for other in sorted(others, key=lambda one: one.file):
        if other.file == file:
            if not other.ours:
                yield f"{file} is somebody else's ({', '.join(other.types) or 'unreadable'})"
        elif other.network == network:
            yield f"{other.file} is a network called {network}, too: podman would find two"
        elif other.file < file and not other.ours:
            yield f"{other.file} comes before {file}: containerd and CRI-O would take that one"
