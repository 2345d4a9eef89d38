"""What is known of pools, blocks and addresses; what the decisions are made from.

Rows come from the store's watch and from this process's own transactions, in any order and more
than once; the later revision wins. A view may lag behind the store: it proposes, the transaction
decides. `hold` marks what this process is about to write, so that its own requests do not race
each other for one address.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from ipam.block import Block, Family, family_of
from ipam.keys import NodeRecord, Owner
from ipam.pool import Pool, first, last
from ipam.ranges import Ranges, around, size, within

# Why an address of a block is not free; flags, because they come and go on their own.
_TAKEN, _COOLING, _HELD = 1, 2, 4
_BUSY = _TAKEN | _HELD


@dataclass(frozen=True, slots=True)
class Assigned:
    """An address that is handed out, or kept for its owner until `retained_until` (not 0).
    `retain_s`: how long it is going to be kept after its release."""

    pool: str
    address: int
    block: Block
    node: str
    owner: Owner
    revision: int = 0
    retain_s: int = 0
    retained_until: float = 0.0


@dataclass(frozen=True, slots=True)
class Claimed:
    """A block that a node draws from. `value` is the stored record, for comparison; `created` the
    revision of the claim, which tells it from a later one."""

    pool: str
    block: Block
    node: str
    value: bytes
    revision: int = 0
    window: int = 0
    created: int = 0


@dataclass(frozen=True, slots=True)
class Node:
    record: NodeRecord
    revision: int


@dataclass(slots=True)
class _Uses:
    """Of one block: offset -> why it is not free. `busy` counts those in use or about to be."""

    why: dict[int, int] = field(default_factory=dict)
    busy: int = 0

    def mark(self, offset: int, flag: int) -> None:
        before = self.why.get(offset, 0)
        self.why[offset] = before | flag
        self.busy += bool((before | flag) & _BUSY) - bool(before & _BUSY)

    def clear(self, offset: int, flag: int) -> None:
        before = self.why.get(offset, 0)
        after = before & ~flag
        self.busy += bool(after & _BUSY) - bool(before & _BUSY)
        if after:
            self.why[offset] = after
        else:
            self.why.pop(offset, None)


@dataclass(slots=True)
class _Space:
    """One pool's blocks. Per CIDR: the numbers of the blocks that somebody has or is claiming, and
    one below which none is free."""

    pool: Pool
    revision: int
    claimed: list[set[int]]
    low: list[int]


_BlockId = tuple[str, Block]
_AddressId = tuple[str, int]


class View:
    def __init__(self) -> None:
        self._spaces: dict[str, _Space] = {}
        self._claimed: dict[_BlockId, Claimed] = {}
        self._of_node: defaultdict[tuple[str, str], dict[Block, Claimed]] = defaultdict(dict)
        self._of_pool: defaultdict[str, dict[Block, Claimed]] = defaultdict(dict)
        self._claiming: set[_BlockId] = set()
        self._assigned: dict[_AddressId, Assigned] = {}
        self._owned: defaultdict[tuple[str, str, str], dict[_AddressId, Assigned]] = defaultdict(
            dict
        )
        self._on_node: defaultdict[str, dict[_AddressId, Assigned]] = defaultdict(dict)
        self._kept: dict[_AddressId, Assigned] = {}
        self._used: defaultdict[tuple[str, Family], int] = defaultdict(int)
        self._cooling: dict[_AddressId, Block] = {}
        self._uses: defaultdict[_BlockId, _Uses] = defaultdict(_Uses)
        self._room: dict[_BlockId, int] = {}
        self._nodes: dict[str, Node] = {}

    # -------------------------------------------------------------- reading

    def pools(self) -> tuple[Pool, ...]:
        return tuple(space.pool for _, space in sorted(self._spaces.items()))

    def pool(self, name: str) -> Pool | None:
        space = self._spaces.get(name)
        return space.pool if space else None

    def pool_revision(self, name: str) -> int:
        return self._spaces[name].revision

    def claiming(self, pool: str) -> bool:
        """A claim of one of the pool's blocks is under way here."""
        return any(name == pool for name, _ in self._claiming)

    def blocks(self) -> Iterator[Claimed]:
        """In no order."""
        return iter(self._claimed.values())

    def blocks_of(self, pool: str, node: str | None = None) -> Iterator[Claimed]:
        rows = self._of_pool.get(pool) if node is None else self._of_node.get((pool, node))
        return iter(rows.values() if rows else ())

    def claim_of(self, pool: str, block: Block) -> Claimed | None:
        return self._claimed.get((pool, block))

    def assigned(self) -> Iterator[Assigned]:
        """In no order."""
        return iter(self._assigned.values())

    def on_node(self, node: str) -> tuple[Assigned, ...]:
        return tuple(self._on_node.get(node, {}).values())

    def retained(self) -> Iterator[Assigned]:
        """Released, and kept for their owners. In no order."""
        return iter(self._kept.values())

    def holder(self, pool: str, address: int) -> Assigned | None:
        return self._assigned.get((pool, address))

    def who_has(self, address: int) -> Assigned | None:
        return next((r for name in self._spaces if (r := self.holder(name, address))), None)

    def held_by(self, owner: Owner) -> tuple[Assigned, ...]:
        """IPv4 first. Of all the owner's incarnations."""
        rows = self._owned.get(_who(owner))
        return tuple(sorted(rows.values(), key=lambda row: row.address)) if rows else ()

    def is_cooling(self, pool: str, address: int) -> bool:
        return (pool, address) in self._cooling

    def used(self, pool: str, family: Family = Family.V4) -> int:
        return self._used.get((pool, family), 0)

    def cooling(self, pool: str, family: Family = Family.V4) -> int:
        return sum(1 for name, a in self._cooling if name == pool and family_of(a) is family)

    def used_in(self, pool: str, block: Block) -> int:
        uses = self._uses.get((pool, block))
        return sum(1 for why in uses.why.values() if why & _TAKEN) if uses else 0

    def idle(self, pool: str, block: Block) -> bool:
        """No address of the block is in use or about to be."""
        uses = self._uses.get((pool, block))
        return uses is None or not uses.busy

    def room(self, claim: Claimed) -> int:
        """How many of the block's addresses, its node's window apart, may be handed out now."""
        known = self._room.get((claim.pool, claim.block))
        if known is None:
            known = self._room[claim.pool, claim.block] = self._count(claim)
        return known

    def window_room(self, claim: Claimed) -> int:
        """How many addresses of the window are not known to be in use."""
        lost = self._lost(claim.pool, claim.block)
        uses = self._uses.get((claim.pool, claim.block))
        used = sum(1 for offset in uses.why if offset < claim.window) if uses else 0
        return claim.window - size(within(lost, 0, claim.window - 1)) - used

    def pick(self, claim: Claimed, spread: int) -> int | None:
        """A free address at or after `spread`, from the start again after the end."""
        if not self.room(claim):
            return None
        block, lost = claim.block, self._lost(claim.pool, claim.block)
        uses = self._uses.get((claim.pool, block))
        why = uses.why if uses else {}
        at = claim.window + spread % (block.count - claim.window)
        for start in (at, claim.window):
            at = start
            while at < block.count:
                gap = around(lost, at) if lost else None
                if gap is not None:
                    at = gap[1] + 1
                elif at in why:
                    at += 1
                else:
                    return block.base + at
        return None

    def is_free(self, pool: str, block: Block, address: int) -> bool:
        uses = self._uses.get((pool, block))
        return uses is None or address - block.base not in uses.why

    def unclaimed(self, pool: str, family: Family, spread: int) -> Block | None:
        """A block that nobody has. IPv4: the first of the first CIDR that has one. IPv6 is sparse:
        the first at or after `spread` of each CIDR, so that two nodes rarely want the same."""
        space = self._spaces[pool]
        length = space.pool.size_of(family)
        for i, cidr in enumerate(space.pool.cidrs):
            if cidr.version != family:
                continue
            count = 1 << (length - cidr.prefixlen)
            starts = (space.low[i],) if family is Family.V4 else (spread % count, 0)
            for start in starts:
                found = _first_free(space.pool, i, space.claimed[i], start)
                if family is Family.V4:
                    space.low[i] = count if found is None else _number(found, first(cidr))
                if found is not None:
                    return found
        return None

    def nodes(self) -> dict[str, Node]:
        return self._nodes

    # -------------------------------------------------------------- what is under way here

    def hold(self, pool: str, block: Block, address: int) -> None:
        self._mark(pool, block, address, _HELD)

    def drop(self, pool: str, block: Block, address: int) -> None:
        self._clear(pool, block, address, _HELD)

    def hold_block(self, pool: str, block: Block) -> None:
        self._claiming.add((pool, block))
        self._block_taken(pool, block, taken=True)

    def drop_block(self, pool: str, block: Block) -> None:
        self._claiming.discard((pool, block))
        self._block_taken(pool, block, taken=(pool, block) in self._claimed)

    # -------------------------------------------------------------- rows from the store

    def put_pool(self, pool: Pool, rev: int = 0) -> None:
        known = self._spaces.get(pool.name)
        if known is not None and known.revision > rev:
            return
        count = len(pool.cidrs)
        self._spaces[pool.name] = _Space(pool, rev, [set() for _ in range(count)], [0] * count)
        for name, block in (*self._claimed, *self._claiming):
            if name == pool.name:
                self._block_taken(name, block, taken=True)
        self._room = {key: room for key, room in self._room.items() if key[0] != pool.name}

    def remove_pool(self, name: str, rev: int) -> None:
        known = self._spaces.get(name)
        if known is not None and known.revision <= rev:
            del self._spaces[name]
            self._room = {key: room for key, room in self._room.items() if key[0] != name}

    def put_block(self, row: Claimed) -> None:
        key = (row.pool, row.block)
        known = self._claimed.get(key)
        if known is not None:
            if known.revision > row.revision:
                return
            self._forget_block(known)
        self._claimed[key] = row
        self._of_node[row.pool, row.node][row.block] = row
        self._of_pool[row.pool][row.block] = row
        self._room.pop(key, None)
        self._block_taken(row.pool, row.block, taken=True)

    def remove_block(self, pool: str, block: Block, rev: int) -> None:
        known = self._claimed.get((pool, block))
        if known is None or known.revision > rev:
            return
        self._forget_block(known)
        self._block_taken(pool, block, taken=(pool, block) in self._claiming)

    def put_address(self, row: Assigned) -> None:
        key = (row.pool, row.address)
        known = self._assigned.get(key)
        if known is not None:
            if known.revision > row.revision:
                return
            self._forget_address(known)
        self._assigned[key] = row
        self._owned[_who(row.owner)][key] = row
        self._on_node[row.node][key] = row
        if row.retained_until:
            self._kept[key] = row
        self._used[row.pool, family_of(row.address)] += 1
        self._mark(row.pool, row.block, row.address, _TAKEN)

    def remove_address(self, pool: str, address: int, rev: int) -> None:
        known = self._assigned.get((pool, address))
        if known is not None and known.revision <= rev:
            self._forget_address(known)

    def put_cooling(self, pool: str, address: int, block: Block) -> None:
        self._cooling[pool, address] = block
        self._mark(pool, block, address, _COOLING)

    def remove_cooling(self, pool: str, address: int) -> None:
        block = self._cooling.pop((pool, address), None)
        if block is not None:
            self._clear(pool, block, address, _COOLING)

    def put_node(self, name: str, record: NodeRecord, rev: int) -> None:
        known = self._nodes.get(name)
        if known is None or known.revision <= rev:
            self._nodes[name] = Node(record, rev)

    def remove_node(self, name: str, rev: int) -> None:
        known = self._nodes.get(name)
        if known is not None and known.revision <= rev:
            del self._nodes[name]

    # -------------------------------------------------------------- inside

    def _lost(self, pool: str, block: Block) -> Ranges:
        """As offsets within the block; all of it when it is not (or no longer) the pool's."""
        space = self._spaces.get(pool)
        if space is None or not space.pool.owns(block):
            return ((0, block.count - 1),)
        parts = within(space.pool.lost, block.base, block.last)
        return tuple((low - block.base, high - block.base) for low, high in parts)

    def _count(self, claim: Claimed) -> int:
        lost = within(self._lost(claim.pool, claim.block), claim.window, claim.block.count - 1)
        uses = self._uses.get((claim.pool, claim.block))
        why = uses.why if uses else {}
        if lost or claim.window:
            used = sum(1 for at in why if at >= claim.window and around(lost, at) is None)
        else:
            used = len(why)
        return claim.block.count - claim.window - size(lost) - used

    def _mark(self, pool: str, block: Block, address: int, flag: int) -> None:
        self._uses[pool, block].mark(address - block.base, flag)
        self._room.pop((pool, block), None)

    def _clear(self, pool: str, block: Block, address: int, flag: int) -> None:
        uses = self._uses[pool, block]
        uses.clear(address - block.base, flag)
        if not uses.why:
            del self._uses[pool, block]
        self._room.pop((pool, block), None)

    def _forget_block(self, row: Claimed) -> None:
        del self._claimed[row.pool, row.block]
        del self._of_node[row.pool, row.node][row.block]
        del self._of_pool[row.pool][row.block]
        self._room.pop((row.pool, row.block), None)

    def _forget_address(self, row: Assigned) -> None:
        key = (row.pool, row.address)
        del self._assigned[key]
        self._kept.pop(key, None)
        for index, at in ((self._owned, _who(row.owner)), (self._on_node, row.node)):
            _drop(index, at, key)
        self._used[row.pool, family_of(row.address)] -= 1
        self._clear(row.pool, row.block, row.address, _TAKEN)

    def _block_taken(self, pool: str, block: Block, *, taken: bool) -> None:
        space = self._spaces.get(pool)
        if space is None or not space.pool.owns(block):
            return
        for i, cidr in enumerate(space.pool.cidrs):
            if first(cidr) <= block.base <= last(cidr) and cidr.version == block.family:
                number = _number(block, first(cidr))
                if taken:
                    space.claimed[i].add(number)
                else:
                    space.claimed[i].discard(number)
                    space.low[i] = min(space.low[i], number)


def _who(owner: Owner) -> tuple[str, str, str]:
    return owner.namespace, owner.name, owner.interface


def _number(block: Block, base: int) -> int:
    """Of a block in the CIDR that begins at `base`."""
    return (block.base - base) >> (block.family.bits - block.size)


def _first_free(pool: Pool, at: int, claimed: set[int], start: int) -> Block | None:
    """The first block of the pool's CIDR number `at` from number `start` on that nobody has and
    that has something to hand out."""
    cidr = pool.cidrs[at]
    family = Family(cidr.version)
    length = pool.size_of(family)
    shift = family.bits - length
    number, count = start, 1 << (length - cidr.prefixlen)
    while number < count:
        block = Block(first(cidr) + (number << shift), length)
        if number in claimed:
            number += 1
        elif not pool.usable(block):
            gap = around(pool.lost, block.base)
            number = max(number + 1, ((gap[1] + 1 - first(cidr)) >> shift) if gap else 0)
        else:
            return block
    return None


def _drop(
    index: defaultdict[str, dict[_AddressId, Assigned]]
    | defaultdict[tuple[str, str, str], dict[_AddressId, Assigned]],
    at: object,
    key: _AddressId,
) -> None:
    rows = index[at]  # type: ignore[index]  # each index is given its own kind of key
    rows.pop(key, None)
    if not rows:
        del index[at]  # type: ignore[arg-type]
