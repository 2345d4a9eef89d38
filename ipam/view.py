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

from ipam.block import Block
from ipam.keys import BlockRecord, Owner
from ipam.pool import Pool, edges, first


@dataclass(frozen=True, slots=True)
class Assigned:
    """An address that is handed out."""

    pool: str
    address: int
    block: Block
    node: str
    owner: Owner
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Claimed:
    """A block that a node draws from. `value` is the stored record, for comparison."""

    pool: str
    block: Block
    node: str
    value: bytes
    revision: int = 0


@dataclass(slots=True)
class _Masks:
    """Of one block, by bit."""

    taken: int = 0
    cooling: int = 0
    held: int = 0


@dataclass(slots=True)
class _Space:
    """One pool's blocks. `blocked`: per CIDR, bit per block: claimed, being claimed or useless."""

    pool: Pool
    revision: int
    blocked: list[int] = field(default_factory=list)
    usable: dict[Block, int] = field(default_factory=dict)


_BlockId = tuple[str, Block]


class View:
    def __init__(self) -> None:
        self._spaces: dict[str, _Space] = {}
        self._claimed: dict[_BlockId, Claimed] = {}
        self._of_node: defaultdict[tuple[str, str], dict[Block, Claimed]] = defaultdict(dict)
        self._of_pool: defaultdict[str, dict[Block, Claimed]] = defaultdict(dict)
        self._claiming: set[_BlockId] = set()
        self._assigned: dict[tuple[str, int], Assigned] = {}
        self._owned: dict[tuple[str, str, str], Assigned] = {}
        self._used: defaultdict[str, int] = defaultdict(int)
        self._cooling: dict[tuple[str, int], Block] = {}
        self._masks: defaultdict[_BlockId, _Masks] = defaultdict(_Masks)

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

    def holder(self, pool: str, address: int) -> Assigned | None:
        return self._assigned.get((pool, address))

    def held_by(self, owner: Owner) -> Assigned | None:
        return self._owned.get(_who(owner))

    def is_cooling(self, pool: str, address: int) -> bool:
        return (pool, address) in self._cooling

    def used(self, pool: str) -> int:
        return self._used.get(pool, 0)

    def cooling(self, pool: str) -> int:
        return sum(1 for name, _ in self._cooling if name == pool)

    def used_in(self, pool: str, block: Block) -> int:
        masks = self._masks.get((pool, block))
        return masks.taken.bit_count() if masks else 0

    def idle(self, pool: str, block: Block) -> bool:
        """No address of the block is in use or about to be."""
        masks = self._masks.get((pool, block))
        return masks is None or not (masks.taken | masks.held)

    def free_in(self, pool: str, block: Block) -> int:
        """Mask of the addresses that may be handed out now."""
        space = self._spaces.get(pool)
        if space is None:
            return 0
        usable = space.usable.get(block)
        if usable is None:
            usable = space.pool.usable(block) if space.pool.owns(block) else 0
            space.usable[block] = usable
        masks = self._masks.get((pool, block))
        return usable & ~(masks.taken | masks.cooling | masks.held) if masks else usable

    def unclaimed(self, pool: str) -> Iterator[tuple[int, int]]:
        """(first address of a CIDR, mask of its blocks that nobody has), CIDRs in their order."""
        space = self._spaces[pool]
        host_bits = 32 - space.pool.block_size
        for cidr, blocked in zip(space.pool.cidrs, space.blocked, strict=True):
            every = (1 << (cidr.num_addresses >> host_bits)) - 1
            yield first(cidr), every & ~blocked

    # -------------------------------------------------------------- what is under way here

    def hold(self, pool: str, block: Block, address: int) -> None:
        self._masks[pool, block].held |= block.bit(address)

    def drop(self, pool: str, block: Block, address: int) -> None:
        self._masks[pool, block].held &= ~block.bit(address)

    def hold_block(self, pool: str, block: Block) -> None:
        self._claiming.add((pool, block))
        self._block_bit(pool, block, blocked=True)

    def drop_block(self, pool: str, block: Block) -> None:
        self._claiming.discard((pool, block))
        self._block_bit(pool, block, blocked=(pool, block) in self._claimed)

    # -------------------------------------------------------------- rows from the store

    def put_pool(self, pool: Pool, rev: int = 0) -> None:
        known = self._spaces.get(pool.name)
        if known is not None and known.revision > rev:
            return
        space = _Space(pool, rev, [0] * len(pool.cidrs))
        self._spaces[pool.name] = space
        for name, block in (*self._claimed, *self._claiming):
            if name == pool.name:
                self._block_bit(name, block, blocked=True)
        for block in _suspects(pool):
            if not pool.usable(block):
                self._block_bit(pool.name, block, blocked=True)

    def remove_pool(self, name: str, rev: int) -> None:
        known = self._spaces.get(name)
        if known is not None and known.revision <= rev:
            del self._spaces[name]

    def put_block(
        self, pool: str, block: Block, record: BlockRecord, value: bytes, rev: int
    ) -> None:
        known = self._claimed.get((pool, block))
        if known is not None:
            if known.revision > rev:
                return
            self._forget_block(known)
        row = Claimed(pool, block, record.node, value, rev)
        self._claimed[pool, block] = row
        self._of_node[pool, record.node][block] = row
        self._of_pool[pool][block] = row
        self._block_bit(pool, block, blocked=True)

    def remove_block(self, pool: str, block: Block, rev: int) -> None:
        known = self._claimed.get((pool, block))
        if known is None or known.revision > rev:
            return
        self._forget_block(known)
        self._block_bit(pool, block, blocked=(pool, block) in self._claiming)

    def put_address(self, row: Assigned) -> None:
        known = self._assigned.get((row.pool, row.address))
        if known is not None:
            if known.revision > row.revision:
                return
            self._forget_address(known)
        self._assigned[row.pool, row.address] = row
        self._owned[_who(row.owner)] = row
        self._used[row.pool] += 1
        self._masks[row.pool, row.block].taken |= row.block.bit(row.address)

    def remove_address(self, pool: str, address: int, rev: int) -> None:
        known = self._assigned.get((pool, address))
        if known is not None and known.revision <= rev:
            self._forget_address(known)

    def put_cooling(self, pool: str, address: int, block: Block) -> None:
        self._cooling[pool, address] = block
        self._masks[pool, block].cooling |= block.bit(address)

    def remove_cooling(self, pool: str, address: int) -> None:
        block = self._cooling.pop((pool, address), None)
        if block is not None:
            self._masks[pool, block].cooling &= ~block.bit(address)

    # -------------------------------------------------------------- inside

    def _forget_block(self, row: Claimed) -> None:
        del self._claimed[row.pool, row.block]
        del self._of_node[row.pool, row.node][row.block]
        del self._of_pool[row.pool][row.block]

    def _forget_address(self, row: Assigned) -> None:
        del self._assigned[row.pool, row.address]
        if self._owned.get(_who(row.owner)) is row:
            del self._owned[_who(row.owner)]
        self._used[row.pool] -= 1
        self._masks[row.pool, row.block].taken &= ~row.block.bit(row.address)

    def _block_bit(self, pool: str, block: Block, *, blocked: bool) -> None:
        space = self._spaces.get(pool)
        if space is None or not space.pool.owns(block):
            return
        for i, cidr in enumerate(space.pool.cidrs):
            if first(cidr) <= block.base < first(cidr) + cidr.num_addresses:
                bit = 1 << ((block.base - first(cidr)) >> (32 - block.size))
                space.blocked[i] = space.blocked[i] | bit if blocked else space.blocked[i] & ~bit


def _who(owner: Owner) -> tuple[str, str, str]:
    return owner.namespace, owner.name, owner.interface


def _suspects(pool: Pool) -> set[Block]:
    """The blocks that edges or reserved ranges touch, hence may have nothing to give."""
    touched = {edge for cidr in pool.cidrs for edge in edges(cidr)}
    step = 1 << (32 - pool.block_size)
    for network in pool.reserved:
        touched.update(range(first(network), first(network) + network.num_addresses, step))
    return {block for address in touched if (block := pool.block_of(address)) is not None}
