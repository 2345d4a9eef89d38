"""Which addresses for whom: decisions from a view, as values.

    request ──► decide ──► Held      the owner has them already
                       ──► Take      write these if nothing changed (own or borrowed blocks)
                       ──► Resume    the owner's kept addresses are in use again
                       ──► Claim     first make this block the node's, then ask again
                       ──► Full      nothing left
                       ──► Refused   what was asked cannot be, with the words for the caller

One decision covers every family of the pool, so that an endpoint has all of its addresses or none.
The caller commits it in one transaction and, when that loses, puts what it learnt into the view and
decides again. `held` is what the store says the owner has. `spread` is any number; it scatters the
choices of several replicas. IPv6 starts where the owner's hash says: an endpoint that comes back
finds its old address, if it is free, and nobody can count his way to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from hashlib import blake2b

from ipam.block import Block, Family, address_text, family_of
from ipam.keys import Owner
from ipam.pool import Pool
from ipam.view import Assigned, Claimed, View


@dataclass(frozen=True, slots=True)
class Request:
    """`wanted`: static addresses, at most one of a family. `retain_s`: how long the addresses are
    kept for the owner after it has released them."""

    node: str
    owner: Owner
    pool: str
    wanted: tuple[int, ...] = ()
    retain_s: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    assigned: tuple[Assigned, ...]


@dataclass(frozen=True, slots=True)
class Pick:
    """`claim` is what the block's key must still hold. Borrowed when `claim.node` is another."""

    address: int
    claim: Claimed


@dataclass(frozen=True, slots=True)
class Take:
    picks: tuple[Pick, ...]


@dataclass(frozen=True, slots=True)
class Resume:
    kept: tuple[Assigned, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    block: Block


@dataclass(frozen=True, slots=True)
class Full:
    """`in_windows`: free, and not the service's to give: other nodes keep them for themselves."""

    pool: Pool
    family: Family
    used: int
    cooling: int
    in_windows: int = 0
    limited: bool = False

    def __str__(self) -> str:
        back = f", {self.cooling} free again within the cool-down" if self.cooling else ""
        kept = f", {self.in_windows} in nodes' windows" if self.in_windows else ""
        if self.limited:
            bound = "strict" if self.pool.strict else f"max_blocks {self.pool.max_blocks}"
            return (
                f"pool {self.pool.describe()}: the node's own blocks are used up and the pool is"
                f" {bound}{back}; release endpoints of this node or change the pool"
            )
        family = f" {self.family}" if len(self.pool.families) > 1 else ""
        return (
            f"pool {self.pool.describe()} is exhausted: {self.used} of"
            f" {self.pool.capacity(self.family)}{family} addresses in use{back}{kept};"
            f" release endpoints or add a CIDR to pool {self.pool.name}"
        )


class Why(Enum):
    UNKNOWN_POOL = auto()
    NOT_USABLE = auto()
    TAKEN = auto()
    COOLING = auto()


@dataclass(frozen=True, slots=True)
class Refused:
    why: Why
    message: str


Decision = Held | Take | Resume | Claim | Full | Refused


def decide(
    view: View, request: Request, held: Sequence[Assigned] = (), spread: int = 0
) -> Decision:
    if held:
        return judge_held(held, request)
    pool = view.pool(request.pool)
    if pool is None:
        known = ", ".join(p.name for p in view.pools()) or "none"
        return Refused(Why.UNKNOWN_POOL, f"no pool {request.pool!r}; known: {known}")
    static = {family_of(address): address for address in request.wanted}
    if len(static) < len(request.wanted):
        return Refused(Why.NOT_USABLE, f"{request.owner}: give at most one address of each family")
    picks = []
    for family in sorted({*pool.families, *static}):
        found = (
            _static(view, pool, request, static[family])
            if family in static
            else _any(view, pool, request, family, spread)
        )
        if not isinstance(found, Pick):
            return found
        picks.append(found)
    return Take(tuple(picks))


def judge_held(held: Sequence[Assigned], request: Request) -> Held | Resume | Refused:
    """Whether an owner that asks again is the one that has the addresses."""
    row, owner = held[0], request.owner
    addresses = {row.address for row in held}
    has = f"{owner} has {', '.join(address_text(row.address) for row in held)}"
    if row.pool != request.pool or not addresses.issuperset(request.wanted):
        return Refused(Why.TAKEN, f"{has} of pool {row.pool}; release it first")
    if row.retained_until:
        return Resume(tuple(held))
    uid = row.owner.uid
    if uid and owner.uid and uid != owner.uid:
        return Refused(Why.TAKEN, f"{has} under uid {uid}; release that one first")
    if row.node != request.node:
        return Refused(Why.TAKEN, f"{has} on node {row.node}; release it there first")
    return Held(tuple(held))


def sparse(*parts: str) -> int:
    """Where a search through IPv6 starts."""
    return int.from_bytes(blake2b("/".join(parts).encode(), digest_size=16).digest(), "big")


def _static(view: View, pool: Pool, request: Request, address: int) -> Pick | Claim | Refused:
    text = address_text(address)
    block = pool.block_of(address)
    if block is None:
        return Refused(Why.NOT_USABLE, f"{text} is outside pool {pool.describe()}")
    kept = pool.withheld(address)
    if kept is not None:
        return Refused(Why.NOT_USABLE, f"{text} cannot be handed out: it is {kept}")
    holder = view.holder(pool.name, address)
    if holder is not None:
        what = "is kept for" if holder.retained_until else "belongs to"
        return Refused(Why.TAKEN, f"{text} {what} {holder.owner} on node {holder.node}")
    if view.is_cooling(pool.name, address):
        return Refused(Why.COOLING, f"{text} was released a moment ago; try again shortly")
    if not view.is_free(pool.name, block, address):
        return Refused(Why.COOLING, f"{text} is being handed out; try again shortly")
    claim = view.claim_of(pool.name, block)
    if claim is None:
        return Claim(block)
    if address - block.base < claim.window:
        return Refused(
            Why.TAKEN,
            f"{text} is in the window of {block} that node {claim.node} hands out by itself; choose"
            " another, or keep static addresses in a pool with local = false",
        )
    return Pick(address, claim)


def _any(
    view: View, pool: Pool, request: Request, family: Family, spread: int
) -> Pick | Claim | Full:
    owner = request.owner
    if family is Family.V6:
        spread = sparse(owner.namespace, owner.name, owner.interface)
    own = [c for c in view.blocks_of(pool.name, request.node) if c.block.family is family]
    for claim in own:
        address = view.pick(claim, spread)
        if address is not None:
            return Pick(address, claim)
    limited = 0 < pool.max_blocks <= len(own)
    if not limited:
        fresh = view.unclaimed(pool.name, family, sparse(request.node))
        if fresh is not None:
            return Claim(fresh)
    lent = None if pool.strict else _borrowed(view, pool, family, spread)
    return lent or _full(view, pool, family, limited=limited or pool.strict)


def _borrowed(view: View, pool: Pool, family: Family, spread: int) -> Pick | None:
    """From the block with the most room, so that its own node is crowded last."""
    best, most = None, 0
    for claim in view.blocks_of(pool.name):
        room = view.room(claim) if claim.block.family is family else 0
        if room > most:
            best, most = claim, room
    address = view.pick(best, spread) if best is not None else None
    return Pick(address, best) if best is not None and address is not None else None


def _full(view: View, pool: Pool, family: Family, *, limited: bool) -> Full:
    windows = sum(
        view.window_room(claim)
        for claim in view.blocks_of(pool.name)
        if claim.window and claim.block.family is family
    )
    used, cooling = view.used(pool.name, family), view.cooling(pool.name, family)
    free = pool.capacity(family) > used + cooling + windows
    return Full(pool, family, used, cooling, windows, limited and free)
