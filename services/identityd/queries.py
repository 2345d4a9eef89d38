"""Questions about identities, answered from the view.

A list is read page by page at the revision of its first page: what has changed since is undone from
the feed of changes, so no page shows a state that never was, and no snapshot is kept for a reader
who may not come back. Any replica can give the next page.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final

from identity import labels as label_sets
from identity.labels import Labels
from identity.numbers import FIRST_ALLOCATED, FIRST_LOCAL, NumericIdentity, Scope, scope_of
from identity.selector import Selector
from services.identityd.announced import Address
from services.identityd.feed import Change, ChangeKind
from services.identityd.view import IdentityView
from services.runtime.clock import Clock
from services.runtime.errors import Conflict, Invalid, NotFound, Retry
from services.store.model import Revision

# Another replica's revision may be a moment ahead of this one's.
CATCH_UP_S: Final = 2.0
_POLL_S: Final = 0.02
# Identities told at once while a watch lists.
LISTED_AT_ONCE: Final = 1000
# Addresses looked at between two turns of the loop.
SCANNED_AT_ONCE: Final = 2000

_EXISTENCE: Final = frozenset({ChangeKind.CREATED, ChangeKind.DELETED})


@dataclass(frozen=True, slots=True)
class Shown:
    """`nodes` and `addresses` are of now, whatever the revision of the list."""

    number: NumericIdentity
    labels: Labels
    nodes: tuple[str, ...]
    addresses: int


@dataclass(frozen=True, slots=True)
class Page:
    identities: tuple[Shown, ...]
    revision: Revision
    more: bool


@dataclass(frozen=True, slots=True)
class Reference:
    node: str
    held: bool
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """A piece of a watch. `listed`: part of the list; `synced`: its last part."""

    revision: Revision
    listed: tuple[tuple[NumericIdentity, Labels], ...] = ()
    changes: tuple[Change, ...] = ()
    reset: bool = False
    synced: bool = False


class IdentityQueries:
    def __init__(self, view: IdentityView, clock: Clock, cluster: str) -> None:
        self._view = view
        self._clock = clock
        self._cluster = cluster

    # ------------------------------------------------------------------ one and many

    def get(self, number: int) -> Shown:
        """Raises `NotFound` for numbers that only the node which made them knows."""
        if shown_scope(number) == Scope.LOCAL.value:
            raise NotFound(f"identity {number} is local to one node; ask that node's agent")
        labels = self._view.labels_of(NumericIdentity(number))
        if labels is None:
            raise NotFound(f"identity {number} is not in use in cluster {self._cluster!r}")
        return self._shown(NumericIdentity(number), labels)

    async def page(self, selector: str, limit: int, after: int, revision: int) -> Page:
        """`limit` 0: all. `revision` 0: the newest. Raises `Conflict` for a forgotten one."""
        chosen = _parsed(selector)
        at = Revision(revision) or self._view.revision
        await self._reached(at)
        was = self._since(at)
        members = self._view.members(chosen)
        for number, labels in was.items():
            if labels is not None and chosen.matches(labels):
                members.add(number)
            else:
                members.discard(number)
        shown: list[Shown] = []
        for member in members.iter_equal_or_larger(after + 1):
            if limit and len(shown) == limit:
                return Page(tuple(shown), at, more=True)
            number = NumericIdentity(member)
            labels = was.get(number) or self._view.labels_of(number)
            if labels is not None:
                shown.append(self._shown(number, labels))
        return Page(tuple(shown), at, more=False)

    def _shown(self, number: NumericIdentity, labels: Labels) -> Shown:
        nodes = tuple(self._view.nodes_of(number))
        return Shown(number, labels, nodes, self._view.announced.count(number))

    async def _reached(self, revision: Revision) -> None:
        deadline_s = self._clock.monotonic_s() + CATCH_UP_S
        while self._view.revision < revision:
            if self._clock.monotonic_s() > deadline_s:
                raise Retry(
                    f"this identityd has seen revision {self._view.revision}, the list began at"
                    f" {revision}; try again in a moment"
                )
            await self._clock.sleep(_POLL_S)

    def _since(self, revision: Revision) -> dict[NumericIdentity, Labels | None]:
        """What has come or gone after `revision`, as it was then; None: it was not there."""
        changes = self._view.feed.since(revision)
        if changes is None:
            raise Conflict(
                f"the list of revision {revision} can no longer be read; begin anew without a"
                " cursor"
            )
        was: dict[NumericIdentity, Labels | None] = {}
        for change in changes:
            if change.kind in _EXISTENCE:
                gone = change.kind is ChangeKind.DELETED
                was.setdefault(change.number, change.labels if gone else None)
        return was

    # ------------------------------------------------------------------ references and addresses

    def references(self, number: int) -> tuple[Shown, tuple[Reference, ...]]:
        shown = self.get(number)
        by_node: dict[str, list[Address]] = {node: [] for node in shown.nodes}
        for address in self._view.announced.of_identity(shown.number):
            by_node.setdefault(address.node or address.host_ip, []).append(address)
        held = set(shown.nodes)
        return shown, tuple(
            Reference(node, node in held, tuple(by_node[node])) for node in sorted(by_node)
        )

    def of_identity(self, number: int) -> list[str]:
        """Announced addresses, in no order. Raises `NotFound` as `get` does."""
        shown = self.get(number)
        return [address.ip for address in self._view.announced.of_identity(shown.number)]

    async def of_endpoint(self, endpoint: str) -> list[str]:
        """`endpoint`: namespace/name, or a name in any namespace."""
        namespace, slash, name = endpoint.rpartition("/")
        if slash:
            return [a.ip for a in self._view.announced.of_endpoint(namespace, name)]
        return await self._scan(lambda address: address.name == name)

    async def of_node(self, node: str) -> list[str]:
        return await self._scan(lambda address: node in (address.node, address.host_ip))

    async def of_cidr(self, cidr: str) -> list[str]:
        """Raises `Invalid`."""
        network = parsed_cidr(cidr)
        return await self._scan(lambda address: ip_address(address.ip) in network)

    async def _scan(self, wanted: Callable[[Address], bool]) -> list[str]:
        found: list[str] = []
        for scanned, ip in enumerate(list(self._view.announced)):
            if scanned % SCANNED_AT_ONCE == SCANNED_AT_ONCE - 1:
                await asyncio.sleep(0)
            address = self._view.announced.at(ip)
            if address is not None and wanted(address):
                found.append(ip)
        return found

    def rows(self, ips: Iterable[str], limit: int, after: str) -> tuple[list[Address], bool]:
        """In the order of addresses, at most `limit` (0: all) after `after` (empty: from the
        first); whether there are more. Raises `Invalid` for an `after` that is no address."""
        first = address_order(after) if after else (0, b"")
        later = sorted((order, ip) for ip in ips if (order := address_order(ip)) > first)
        chosen = later[:limit] if limit else later
        rows = (self._view.announced.at(ip) for _, ip in chosen)
        return [row for row in rows if row is not None], len(later) > len(chosen)

    # ------------------------------------------------------------------ watching

    async def watch(
        self, selector: str, revision: int, *, references: bool
    ) -> AsyncGenerator[Told, None]:
        """Endless, and begins at once. `revision` 0: from the list on."""
        chosen = _parsed(selector)
        at = Revision(revision)
        reset = False
        while True:
            if not at or self._view.feed.since(at) is None:
                reset = bool(at) or reset
                at = self._view.revision
                for piece in self._listed(chosen, at, reset=reset):
                    yield piece
            else:
                yield Told(at)
            async for batch in self._view.feed.follow(at):
                at = batch[-1].revision
                changes = tuple(
                    change
                    for change in batch
                    if (references or change.kind in _EXISTENCE) and chosen.matches(change.labels)
                )
                yield Told(at, changes=changes)

    def _listed(self, chosen: Selector, at: Revision, *, reset: bool) -> list[Told]:
        members = self._view.members(chosen)
        every = [(NumericIdentity(n), self._view.labels_of(NumericIdentity(n))) for n in members]
        known = [(number, labels) for number, labels in every if labels is not None]
        pieces = [
            Told(Revision(0), listed=tuple(known[first : first + LISTED_AT_ONCE]))
            for first in range(0, len(known), LISTED_AT_ONCE)
        ]
        if reset:
            pieces.insert(0, Told(Revision(0), reset=True))
        return [*pieces, Told(at, synced=True)]


def _parsed(selector: str) -> Selector:
    try:
        return Selector.parse(selector)
    except label_sets.Invalid as error:
        raise Invalid(str(error)) from None


def shown_scope(number: int) -> str:
    """Raises `NotFound` for what is no identity."""
    if FIRST_ALLOCATED <= number < FIRST_LOCAL:  # nearly all of them, in lists
        return Scope.CLUSTER.value
    try:
        scope = scope_of(number)
    except label_sets.Invalid as error:
        raise NotFound(str(error)) from None
    match scope:
        case Scope.FIXED:
            return Scope.RESERVED.value
        case Scope.REMOTE_NODE:
            return Scope.LOCAL.value
        case _:
            return scope.value


def address_order(ip: str) -> tuple[int, bytes]:
    """IPv4 before IPv6, each by number. Raises `Invalid`."""
    try:
        parsed = ip_address(ip)
    except ValueError:
        raise Invalid(f"{ip!r} is not an IP address") from None
    return parsed.version, parsed.packed


def parsed_cidr(cidr: str) -> IPv4Network | IPv6Network:
    """Raises `Invalid`."""
    try:
        return ip_network(cidr, strict=False)
    except ValueError as error:
        raise Invalid(f"{cidr!r} is not a CIDR: {error}") from None
