"""An endpoint as the specification's result, and what CHECK finds of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from datapath.agent.record import EndpointRecord
from datapath.cni.request import Request
from datapath.cni.spec import CniError, Code, Interface, Ip, Result, Route, older
from datapath.links import DEFAULT_ROUTE, DEFAULT_ROUTE6, GATEWAY, GATEWAY6, MTU, Inside

INSIDE = 1
"""The place of the container's interface in `interfaces`; the host's is before it."""


def result(record: EndpointRecord, request: Request) -> Result:
    version = request.version
    mtu = 0 if older(version, "1.1.0") else record.mtu or MTU
    return Result(
        version,
        (
            Interface(record.outer, record.host_mac.hex(":"), mtu=mtu),
            Interface(record.interface, record.mac.hex(":"), record.netns, mtu),
        ),
        tuple(
            Ip(
                address,
                _family(address) if older(version, "1.0.0") else "",
                _gateway(address),
                INSIDE,
            )
            for address in addresses(record)
        ),
        tuple(Route(dst, _gateway(dst)) for dst in routes(record)),
        request.config.dns,
    )


def addresses(record: EndpointRecord) -> tuple[str, ...]:
    """With their prefix length, which makes each a network of its own."""
    return tuple(f"{ip}/{128 if ':' in ip else 32}" for ip in record.ips)


def routes(record: EndpointRecord) -> tuple[str, ...]:
    """Those its addresses can be the source of."""
    wanted = record.routes or (DEFAULT_ROUTE, DEFAULT_ROUTE6)
    return tuple(dst for dst in wanted if record.address6 or _family(dst) == "4")


def _family(text: str) -> str:
    return "6" if ":" in text else "4"


def _gateway(text: str) -> str:
    return str(GATEWAY6 if ":" in text else GATEWAY)


def expected_result(request: Request) -> Result:
    """What the runtime believes there is. Raises `CniError`."""
    if request.config.prev_result is None:
        raise CniError(
            Code.BAD_CONFIG, "CHECK without prevResult", "the runtime passes what ADD answered"
        )
    return request.config.prev_result


@dataclass(frozen=True, slots=True)
class Seen:
    """What there is of an endpoint. `inside` None: no such interface in the namespace."""

    inside: Inside | None
    outer: bool
    carrier: bool
    judged: bool
    row: bool
    delivered: bool


def differences(request: Request, record: EndpointRecord, seen: Seen) -> Iterator[str]:
    """Whatever would keep this container's packets from being delivered or judged. Of a chained
    plugin's changes (more routes, another MTU) nothing is said."""
    if not seen.outer:
        yield f"host interface {record.outer} is gone"
    elif not seen.carrier:
        yield f"host interface {record.outer} is down"
    if not seen.judged:
        yield f"no programs judge {record.outer}"
    if not seen.row:
        yield f"the endpoints map does not have {record.outer} as {record.ref}"
    if not seen.delivered:
        ips = " and ".join(record.ips)
        yield f"the map of local addresses does not lead {ips} to {record.outer}"
    if seen.inside is None:
        yield f"interface {record.interface} is not in {record.netns}"
    else:
        yield from _differences_inside(request, record, seen.inside)


def _differences_inside(request: Request, record: EndpointRecord, inside: Inside) -> Iterator[str]:
    name = record.interface
    if not inside.up:
        yield f"interface {name} is down"
    if inside.mac != record.mac:
        mac, expected = inside.mac.hex(":"), record.mac.hex(":")
        yield f"interface {name} has MAC {mac}; packets pass with {expected} only"
    for address in addresses(record):
        if address not in inside.addresses:
            yield f"interface {name} lacks address {address}"
    previous = expected_result(request)
    for ip in previous.ips:
        if ip.interface == INSIDE and ip.address not in addresses(record):
            yield f"prevResult has {ip.address}, the endpoint has {', '.join(addresses(record))}"
    for route in previous.routes:
        if route.gw == _gateway(route.dst) and route.dst not in inside.routes:
            yield f"the route to {route.dst} is gone"
