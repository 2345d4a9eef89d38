"""Which address for whom: decisions from a view, as values.

    request ──► decide ──► Held      the owner has one already
                       ──► Take      write this address if nothing changed (own or borrowed block)
                       ──► Claim     first make this block the node's, then ask again
                       ──► Full      nothing left
                       ──► Refused   what was asked cannot be, with the words for the caller

The caller commits a decision in one transaction and, when that loses, puts what it learnt into
the view and decides again. `spread` is any number; it scatters the choices of several replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from ipam.block import BITS, Block, pick
from ipam.keys import Owner
from ipam.pool import Pool, address_text, edges
from ipam.view import Assigned, Claimed, View


@dataclass(frozen=True, slots=True)
class Request:
    """`wanted`: a static address; None for any."""

    node: str
    owner: Owner
    pool: str
    wanted: int | None = None


@dataclass(frozen=True, slots=True)
class Held:
    assigned: Assigned


@dataclass(frozen=True, slots=True)
class Take:
    """`claim` is what the block's key must still hold. Borrowed when `claim.node` is another."""

    address: int
    claim: Claimed


@dataclass(frozen=True, slots=True)
class Claim:
    block: Block


@dataclass(frozen=True, slots=True)
class Full:
    pool: Pool
    used: int
    cooling: int

    def __str__(self) -> str:
        back = f", {self.cooling} free again within the cool-down" if self.cooling else ""
        return (
            f"pool {self.pool.describe()} is exhausted: {self.used} of {self.pool.capacity}"
            f" addresses in use{back}; release endpoints or add a CIDR to"
            f" [ipamd.pools.{self.pool.name}]"
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


Decision = Held | Take | Claim | Full | Refused


def decide(view: View, request: Request, spread: int = 0) -> Decision:
    held = view.held_by(request.owner)
    if held is not None:
        return judge_held(held, request)
    pool = view.pool(request.pool)
    if pool is None:
        known = ", ".join(p.name for p in view.pools()) or "none"
        return Refused(Why.UNKNOWN_POOL, f"no pool {request.pool!r}; known: {known}")
    if request.wanted is not None:
        return _static(view, pool, request.wanted)
    return (
        _own(view, request, spread)
        or _fresh(view, pool)
        or _borrowed(view, pool, spread)
        or Full(pool, view.used(pool.name), view.cooling(pool.name))
    )


def judge_held(held: Assigned, request: Request) -> Held | Refused:
    """Whether an owner that asks again is the one that has the address."""
    has = f"{request.owner} has {address_text(held.address)}"
    uid, asked = held.owner.uid, request.owner.uid
    if uid and asked and uid != asked:
        return Refused(Why.TAKEN, f"{has} under uid {uid}; release that one first")
    if held.node != request.node:
        return Refused(Why.TAKEN, f"{has} on node {held.node}; release it there first")
    if held.pool != request.pool or request.wanted not in (None, held.address):
        return Refused(Why.TAKEN, f"{has} of pool {held.pool}; release it first")
    return Held(held)


def _static(view: View, pool: Pool, address: int) -> Take | Claim | Refused:
    text = address_text(address)
    cidr, block = pool.cidr_of(address), pool.block_of(address)
    if cidr is None or block is None:
        return Refused(Why.NOT_USABLE, f"{text} is outside pool {pool.describe()}")
    if not pool.usable(block) & block.bit(address):
        what = f"an edge of {cidr}" if address in edges(cidr) else "reserved"
        return Refused(Why.NOT_USABLE, f"{text} cannot be handed out: it is {what}")
    holder = view.holder(pool.name, address)
    if holder is not None:
        return Refused(Why.TAKEN, f"{text} belongs to {holder.owner} on node {holder.node}")
    if view.is_cooling(pool.name, address):
        return Refused(Why.COOLING, f"{text} was released a moment ago; try again shortly")
    if not view.free_in(pool.name, block) & block.bit(address):
        return Refused(Why.COOLING, f"{text} is being handed out; try again shortly")
    claim = view.claim_of(pool.name, block)
    return Take(address, claim) if claim is not None else Claim(block)


def _own(view: View, request: Request, spread: int) -> Take | None:
    for claim in view.blocks_of(request.pool, request.node):
        free = view.free_in(request.pool, claim.block)
        if free:
            return Take(claim.block.base + pick(free, spread % claim.block.count), claim)
    return None


def _fresh(view: View, pool: Pool) -> Claim | None:
    for base, mask in view.unclaimed(pool.name):
        if mask:
            return Claim(Block(base + (pick(mask, 0) << (BITS - pool.block_size)), pool.block_size))
    return None


def _borrowed(view: View, pool: Pool, spread: int) -> Take | None:
    """From the block with the most room, so that its own node is crowded last."""
    best, free = None, 0
    for claim in view.blocks_of(pool.name):
        room = view.free_in(pool.name, claim.block)
        if room.bit_count() > free.bit_count():
            best, free = claim, room
    if best is None:
        return None
    return Take(best.block.base + pick(free, spread % best.block.count), best)
