"""Which rows a reader wants. Every given field must match; an empty choice takes everything."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network

from msgspec import Struct

from datapath.inspection.rows import ConnectionRow, EndpointRow, IpcacheRow, MetricRow, PolicyRow
from services.runtime.errors import Invalid


class Choice(Struct, frozen=True, forbid_unknown_fields=True):
    """`address`: an address or a prefix that holds it. `identity`, `address`, `port` match either
    end of a connection; `endpoint` is an endpoint's number."""

    address: str = ""
    identity: int | None = None
    endpoint: int | None = None
    slot: int | None = None
    direction: str = ""
    proto: str = ""
    port: int | None = None
    reason: int | None = None

    def network(self) -> IPv4Network | IPv6Network | None:
        """Raises `Invalid`."""
        if not self.address:
            return None
        try:
            return ip_network(self.address, strict=False)
        except ValueError:
            raise Invalid(
                f"{self.address!r} is neither an address nor a prefix, such as 10.0.0.1 or "
                "10.0.0.0/24"
            ) from None

    @property
    def empty(self) -> bool:
        return self == Choice()

    def takes_endpoint(self, row: EndpointRow) -> bool:
        return (
            (self.endpoint is None or row.id == self.endpoint)
            and (self.identity is None or row.identity == self.identity)
            and (self.slot is None or self.slot in (row.slot_in, row.slot_out))
            and (self._holds(row.address) or (row.address6 != "" and self._holds(row.address6)))
        )

    def takes_policy(self, row: PolicyRow) -> bool:
        return (
            (self.endpoint is None or self.endpoint in row.endpoints)
            and (self.slot is None or row.slot == self.slot)
            and (not self.direction or row.direction == self.direction)
            and (self.identity is None or self.identity in row.peers)
            and (not self.proto or row.proto in (self.proto, "any"))
            and (self.port is None or _within(self.port, row.ports))
        )

    def takes_address(self, row: IpcacheRow) -> bool:
        return (self.identity is None or row.identity == self.identity) and self._holds(row.cidr)

    def takes_connection(self, row: ConnectionRow) -> bool:
        return (
            (not self.proto or row.proto == self.proto)
            and (self.port is None or self.port in (row.source_port, row.destination_port))
            and (
                self.identity is None
                or self.identity in (row.source_identity, row.destination_identity)
            )
            and (self._holds(row.source) or self._holds(row.destination))
        )

    def takes_metric(self, row: MetricRow) -> bool:
        return (self.reason is None or row.reason == self.reason) and (
            not self.direction or row.direction == self.direction
        )

    def _holds(self, cidr: str) -> bool:
        wanted = self.network()
        if wanted is None:
            return True
        found = ip_network(cidr)
        # A look-up of one address wants the prefixes that hold it; a prefix what lies within.
        single = wanted.prefixlen == wanted.max_prefixlen
        outer, inner = (found, wanted) if single else (wanted, found)
        if isinstance(outer, IPv4Network) and isinstance(inner, IPv4Network):
            return inner.subnet_of(outer)
        if isinstance(outer, IPv6Network) and isinstance(inner, IPv6Network):
            return inner.subnet_of(outer)
        return False


def _within(port: int, ports: str) -> bool:
    if ports == "any":
        return True
    first, _, last = ports.partition("-")
    return int(first) <= port <= int(last or first)
