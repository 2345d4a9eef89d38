"""Keys and values of the address service in the store.

    tessera/ipam/pool/<pool>                    PoolRecord
    tessera/ipam/blk/<pool>/<block>             BlockRecord: which node draws from the block
    tessera/ipam/ip/<pool>/<address>            AddressRecord: who has the address
    tessera/ipam/own/<ns>/<name>/<interface>    OwnerRecord: the same by owner
    tessera/ipam/cool/<pool>/<address>          leased: released a moment ago; value is the block

<address> is written with three digits per octet, so that the order of keys is the order of
addresses and a block is one contiguous range. <block> is its first address, a dash, the prefix
length. `ip` and `own` of one address are always written and deleted in one transaction and have
the same modification revision.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address

from msgspec import Struct

from ipam.block import Block

ROOT = "tessera/ipam/"
POOLS = ROOT + "pool/"
BLOCKS = ROOT + "blk/"
ADDRESSES = ROOT + "ip/"
COOLING = ROOT + "cool/"
OWNERS = ROOT + "own/"


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
    cidrs: tuple[str, ...]
    block_size: int
    reserved: tuple[str, ...] = ()


class BlockRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """`claimed_at`: seconds since 1970; tells a claim from an earlier one of the same node."""

    node: str
    claimed_at: float


class AddressRecord(Struct, frozen=True, forbid_unknown_fields=True):
    namespace: str
    name: str
    interface: str
    uid: str
    node: str
    block: str
    allocated_at: float

    @property
    def owner(self) -> Owner:
        return Owner(self.namespace, self.name, self.interface, self.uid)


class OwnerRecord(Struct, frozen=True, forbid_unknown_fields=True):
    pool: str
    ip: str
    block: str
    node: str
    uid: str


# ------------------------------------------------------------------ keys


def padded(address: int) -> str:
    return ".".join(f"{octet:03d}" for octet in address.to_bytes(4, "big"))


def parse_padded(text: str) -> int:
    octets = [int(part, 10) for part in text.split(".")]
    if len(octets) != 4:
        raise ValueError(f"{text!r} is not an address key")
    return int.from_bytes(bytes(octets), "big")


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


def address_range(pool: str, first: int, last: int) -> tuple[str, str]:
    """[key, end) of the addresses first..last."""
    return address_key(pool, first), address_key(pool, last) + "\0"


def parse_pool_key(key: str) -> str:
    return key.removeprefix(POOLS)


def parse_block_key(key: str) -> tuple[str, Block]:
    pool, _, name = key.removeprefix(BLOCKS).partition("/")
    base, _, size = name.partition("-")
    return pool, Block(parse_padded(base), int(size))


def parse_address_key(key: str, prefix: str = ADDRESSES) -> tuple[str, int]:
    """Of an `ip` key, or with prefix COOLING of a `cool` key."""
    pool, _, address = key.removeprefix(prefix).partition("/")
    return pool, parse_padded(address)


def parse_address(text: str) -> int:
    """Raises ValueError."""
    return int(IPv4Address(text))
