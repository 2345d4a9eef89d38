"""Keys and values of the address service in the store.

    tessera/ipam/pool/<pool>                    PoolRecord
    tessera/ipam/blk/<pool>/<block>             BlockRecord: which node draws from the block
    tessera/ipam/ip/<pool>/<address>            AddressRecord: who has the address
    tessera/ipam/own/<ns>/<name>/<interface>    OwnerRecord: the same by owner
    tessera/ipam/cool/<pool>/<address>          leased: released a moment ago; value is the block
    tessera/ipam/node/<node>                    NodeRecord: a node that keeps windows, and lives

<address> is written at full length, so that the order of keys is the order of addresses and a block
is one contiguous range: 010.000.000.007, and xfd00:0000:...:0007 for IPv6, whose mark keeps the
families apart. <block> is its first address, a dash, the prefix length. The `ip` keys and the `own`
key of one allocation are written in one transaction and have the same modification revision; an
`ip` key whose owner is known under another revision is an earlier incarnation's.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

from ipam.block import Block, Family, address_text, family_of
from ipam.pool import BLOCK_SIZE, BLOCK_SIZE_V6, Pool, define

ROOT = "tessera/ipam/"
POOLS = ROOT + "pool/"
BLOCKS = ROOT + "blk/"
ADDRESSES = ROOT + "ip/"
COOLING = ROOT + "cool/"
OWNERS = ROOT + "own/"
NODES = ROOT + "node/"


@dataclass(frozen=True, slots=True, order=True)
class Owner:
    """`uid` empty: the owner's incarnations are not told apart. Not part of the key."""

    namespace: str
    name: str
    interface: str
    uid: str = ""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name} {self.interface}"

    def problem(self) -> str | None:
        """Why this cannot be a key, in words."""
        for what, text in (
            ("namespace", self.namespace),
            ("name", self.name),
            ("interface", self.interface),
        ):
            if wrong := name_problem(what, text):
                return f"owner {self}: {wrong}"
        return None


def name_problem(what: str, text: str) -> str | None:
    if not text:
        return f"{what} is empty"
    if len(text) > 253 or "/" in text or not text.isprintable():
        return f"{what} {text!r} must be at most 253 printable characters without '/'"
    return None


# ------------------------------------------------------------------ values


class PoolRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """What the fields mean: ipam.pool.Pool."""

    cidrs: tuple[str, ...] = ()
    block_size: int = BLOCK_SIZE
    block_size_v6: int = BLOCK_SIZE_V6
    reserved: tuple[str, ...] = ()
    disabled: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    strict: bool = False
    max_blocks: int = 0
    local: bool = True
    cooldown_s: int | None = None


def defined(name: str, record: PoolRecord) -> Pool:
    """Raises `PoolError`."""
    return define(
        name,
        record.cidrs,
        record.block_size,
        record.reserved,
        block_size_v6=record.block_size_v6,
        disabled=record.disabled,
        namespaces=record.namespaces,
        strict=record.strict,
        max_blocks=record.max_blocks,
        local=record.local,
        cooldown_s=record.cooldown_s,
    )


class BlockRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """`claimed_at`: seconds since 1970; tells a claim from an earlier one of the same node.
    `window`: so many of its first addresses are handed out by the node alone, without asking."""

    node: str
    claimed_at: float
    window: int = 0


class AddressRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """`retain_s`: how long it is kept for its owner once released. `retained_until`: it is not in
    use, and kept until then; seconds since 1970."""

    namespace: str
    name: str
    interface: str
    uid: str
    node: str
    block: str
    allocated_at: float
    retain_s: int = 0
    retained_until: float = 0.0

    @property
    def owner(self) -> Owner:
        return Owner(self.namespace, self.name, self.interface, self.uid)


class OwnedAddress(Struct, frozen=True, forbid_unknown_fields=True):
    ip: str
    block: str


class OwnerRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """As the AddressRecords of its addresses."""

    pool: str
    addresses: tuple[OwnedAddress, ...]
    node: str
    uid: str
    retain_s: int = 0
    retained_until: float = 0.0


class NodeRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """Written anew when the node is heard from. `instance`: changes when the node lost its disk.
    `networks`: those its own interfaces are in."""

    instance: str
    heard_at: float
    networks: tuple[str, ...] = ()


# ------------------------------------------------------------------ keys


def padded(address: int) -> str:
    if family_of(address) is Family.V4:
        return ".".join(f"{octet:03d}" for octet in address.to_bytes(4, "big"))
    digits = f"{address:032x}"
    return "x" + ":".join(digits[at : at + 4] for at in range(0, 32, 4))


def parse_padded(text: str) -> int:
    if text.startswith("x"):
        address = int(text[1:].replace(":", ""), 16)
        if padded(address) != text:
            raise ValueError(f"{text!r} is not an address key")
        return address
    octets = bytes(map(int, text.split(".")))
    if len(octets) != 4:
        raise ValueError(f"{text!r} is not an address key")
    return int.from_bytes(octets, "big")


def pool_key(pool: str) -> str:
    return f"{POOLS}{pool}"


def block_key(pool: str, block: Block) -> str:
    return f"{BLOCKS}{pool}/{padded(block.base)}-{block.size}"


def address_key(pool: str, address: int) -> str:
    return f"{ADDRESSES}{pool}/{padded(address)}"


def cool_key(pool: str, address: int) -> str:
    return f"{COOLING}{pool}/{padded(address)}"


def owner_key(owner: Owner) -> str:
    return f"{OWNERS}{owner.namespace}/{owner.name}/{owner.interface}"


def node_key(node: str) -> str:
    return f"{NODES}{node}"


def address_range(pool: str, first: int, last: int, prefix: str = ADDRESSES) -> tuple[str, str]:
    """[key, end) of the addresses first..last; with prefix COOLING of the cooling ones, with BLOCKS
    of the blocks that begin there. "~" sorts after all that may follow an address."""
    end = "~" if prefix == BLOCKS else "\0"
    return f"{prefix}{pool}/{padded(first)}", f"{prefix}{pool}/{padded(last)}{end}"


def parse_pool_key(key: str) -> str:
    return key.removeprefix(POOLS)


def parse_node_key(key: str) -> str:
    return key.removeprefix(NODES)


def parse_block_key(key: str) -> tuple[str, Block]:
    pool, _, name = key.removeprefix(BLOCKS).partition("/")
    base, _, size = name.partition("-")
    return pool, Block(parse_padded(base), int(size))


def parse_address_key(key: str, prefix: str = ADDRESSES) -> tuple[str, int]:
    """Of an `ip` key, or with prefix COOLING of a `cool` key."""
    pool, _, address = key.removeprefix(prefix).partition("/")
    return pool, parse_padded(address)


def owned(address: int, block: Block) -> OwnedAddress:
    return OwnedAddress(address_text(address), str(block))
