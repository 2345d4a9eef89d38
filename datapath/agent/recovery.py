"""Start-up: which endpoints there are, from the checkpoint and from what the kernel holds."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from datapath.agent.addresses import dotted
from datapath.agent.checkpoint import Journal
from datapath.agent.record import EndpointRecord, State
from datapath.agent.view import View
from datapath.maps.layout import HOST_IFINDEX, Endpoint
from identity.numbers import NumericIdentity
from services.runtime.log import logger

log = logger(__name__)

UNNAMED = "unnamed"


def present(record: EndpointRecord, interfaces: Mapping[str, int]) -> bool:
    """Whether its interface is still the one it was given; it goes with its namespace."""
    return bool(record.ifindex) and interfaces.get(record.outer) == record.ifindex


def adopt(rows: Mapping[int, Endpoint], view: View, interfaces: Mapping[str, int]) -> Journal:
    """Without a checkpoint: the endpoints the kernel judges whose interface exists. Their names
    come from the addresses the stream told of; labels and namespace path are lost, so that such an
    endpoint keeps its identity and can be deleted, but not be given another identity."""
    names = {index: name for name, index in interfaces.items()}
    records = []
    for ifindex, row in sorted(rows.items()):
        outer = names.get(ifindex)
        if outer is None or ifindex == HOST_IFINDEX:
            continue
        known = view.addresses.get(dotted(row.ipv4))
        named = known is not None and known.name != ""
        record = EndpointRecord(
            id=row.id,
            namespace=known.namespace if known and named else UNNAMED,
            name=known.name if known and named else f"endpoint-{row.id}",
            labels=(),
            netns="",
            interface="",
            outer=outer,
            state=State.READY,
            identity=NumericIdentity(row.identity),
            address=row.ipv4,
            ifindex=ifindex,
            mac=row.mac,
            host_mac=row.host_mac,
        )
        log.warning("endpoint.adopted", endpoint=record.ref, address=record.ip, interface=outer)
        records.append(record)
    return Journal(max((row.id for row in rows.values()), default=0) + 1, 0, tuple(records))


def interfaces() -> dict[str, int]:
    """Of the agent's own network namespace, by name."""
    return {name: index for index, name in socket.if_nameindex()}
