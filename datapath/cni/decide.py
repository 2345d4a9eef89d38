"""What a request asks for, given what the node has: decisions, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from datapath.agent.endpoints import Wanted
from datapath.agent.record import EndpointRecord, State
from datapath.cni.request import Request
from datapath.cni.spec import CniError, Code


@dataclass(frozen=True, slots=True)
class Make:
    """Nothing is in its way."""


@dataclass(frozen=True, slots=True)
class Answer:
    """It is there already, as asked for: the same answer again."""

    record: EndpointRecord


@dataclass(frozen=True, slots=True)
class Replace:
    """`old` goes first: its container is gone or was begun anew."""

    old: EndpointRecord


Addition: TypeAlias = Make | Answer | Replace
Lives: TypeAlias = Callable[[EndpointRecord], bool]


def refuse_chained(request: Request) -> None:
    """ADD makes the container's interface, so nobody can have made it before."""
    if request.config.prev_result is None:
        return
    interfaces = ", ".join(one.name for one in request.config.prev_result.interfaces)
    raise CniError(
        Code.BAD_CONFIG,
        f"tessera is not the first plugin of network {request.config.name}: prevResult already "
        f"has {interfaces or 'a result'}",
        "tessera makes the interface and gives the addresses: put it first in `plugins`, before "
        "portmap, bandwidth and tuning, and take out bridge, ptp and the like",
    )


def addition(
    request: Request, wanted: Wanted, records: Iterable[EndpointRecord], lives: Lives
) -> Addition:
    """`records`: of the node, none of them being worked on. Raises `CniError`."""
    refuse_chained(request)
    here = [record for record in records if record.state is not State.RELEASING]
    for record in here:
        if (record.container, record.interface) == (request.container, request.interface):
            same = record.netns == request.netns and record.key == (wanted.namespace, wanted.name)
            return Answer(record) if same and lives(record) else Replace(record)
    for record in here:
        if record.key != (wanted.namespace, wanted.name):
            continue
        if record.container and not lives(record):
            return Replace(record)
        raise CniError(
            Code.TRY_AGAIN,
            f"endpoint {record.ref} belongs to {_holder(record)}",
            "delete that one first, or give this container another name",
        )
    return Make()


def _holder(record: EndpointRecord) -> str:
    if record.container:
        return f"container {record.container}, whose network namespace still exists"
    return "a namespace that `tessera endpoint add` was given"


def attachments(
    records: Iterable[EndpointRecord], container: str, interface: str
) -> list[EndpointRecord]:
    """What DEL takes away; releasing ones are gone as far as a runtime can see."""
    return [
        record
        for record in records
        if record.container == container
        and record.interface == interface
        and record.state is not State.RELEASING
    ]


def garbage(request: Request, records: Iterable[EndpointRecord]) -> list[EndpointRecord]:
    """What GC takes away: attachments of this network that the runtime does not list. Endpoints
    that no runtime asked for are nobody's garbage."""
    valid = request.config.valid_attachments
    if valid is None:
        raise CniError(
            Code.BAD_CONFIG,
            "GC without cni.dev/valid-attachments",
            "an empty list means that no attachment is valid; nothing was removed",
        )
    kept = {(one.containerID, one.ifname) for one in valid}
    return [
        record
        for record in records
        if record.container
        and record.network == request.config.name
        and record.state is not State.RELEASING
        and (record.container, record.interface) not in kept
    ]
