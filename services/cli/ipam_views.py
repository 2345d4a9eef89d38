"""What the tables of `tessera ipam` show of the server's answers."""

from __future__ import annotations

from msgspec import Struct

from services.cli.output import lasting

_HUGE = 1 << 62


class Spec(Struct, frozen=True):
    cidrs: tuple[str, ...]
    block_size: int
    block_size_v6: int
    reserved: tuple[str, ...] = ()
    disabled: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    strict: bool = False
    max_blocks: int = 0
    local: bool = True
    cooldown_s: int | None = None


class Usage(Struct, frozen=True):
    family: int
    capacity: int
    used: int
    cooling: int
    retained: int
    in_windows: int
    per_hour: float
    exhausted_in_s: float | None = None

    def row(self, pool: str) -> tuple[str, ...]:
        huge = self.capacity >= _HUGE
        share = "-" if huge or not self.capacity else f"{100 * self.used / self.capacity:.0f}"
        return (
            pool,
            f"IPv{self.family}",
            str(self.used),
            "very many" if huge else str(self.capacity),
            share,
            str(self.in_windows),
            str(self.cooling),
            str(self.retained),
            self.forecast(),
        )

    def forecast(self) -> str:
        if self.used >= self.capacity:
            return "exhausted"
        if self.exhausted_in_s is None:
            return "-"
        return f"exhausted in {lasting(self.exhausted_in_s)} at {self.per_hour:.0f} an hour"


class Pool(Struct, frozen=True):
    name: str
    spec: Spec
    usage: tuple[Usage, ...]

    def row(self) -> tuple[str, ...]:
        spec = self.spec
        sizes = [
            f"/{size}"
            for size, mark in ((spec.block_size, "."), (spec.block_size_v6, ":"))
            if any(mark in cidr for cidr in spec.cidrs)
        ]
        options = [
            *(["strict"] if spec.strict else []),
            *([f"max_blocks {spec.max_blocks}"] if spec.max_blocks else []),
            *([] if spec.local else ["no windows"]),
            *([f"cooldown {spec.cooldown_s} s"] if spec.cooldown_s is not None else []),
            *(f"reserved {cidr}" for cidr in spec.reserved),
            *(f"disabled {cidr}" for cidr in spec.disabled),
        ]
        return (
            self.name,
            ",".join(spec.cidrs),
            ",".join(sizes),
            ",".join(spec.namespaces) or "-",
            ", ".join(options) or "-",
        )

    def usage_rows(self) -> list[tuple[str, ...]]:
        return [one.row(self.name) for one in self.usage]


class Pools(Struct, frozen=True):
    pools: tuple[Pool, ...]


class Written(Struct, frozen=True):
    action: str


class Owner(Struct, frozen=True):
    namespace: str
    name: str
    interface: str
    uid: str = ""


class Address(Struct, frozen=True):
    ip: str
    pool: str
    block: str
    node: str
    owner: Owner
    revision: int = 0
    retained_until: float = 0.0

    def who(self) -> str:
        return f"{self.owner.namespace}/{self.owner.name}"

    def row(self) -> tuple[str, ...]:
        state = "kept for its owner" if self.retained_until else "in use"
        return (self.ip, self.who(), self.node, self.pool, self.block, state)


class Addresses(Struct, frozen=True):
    addresses: tuple[Address, ...]
    next: str = ""


class Released(Struct, frozen=True):
    released: tuple[Address, ...]


class Forgotten(Struct, frozen=True):
    addresses: int
    blocks: int


class Block(Struct, frozen=True):
    cidr: str
    pool: str
    node: str
    used: int
    size: int
    window: int = 0

    def row(self) -> tuple[str, ...]:
        return (
            self.cidr,
            self.node,
            self.pool,
            str(self.used),
            "very many" if self.size >= _HUGE else str(self.size),
            str(self.window),
        )


class Blocks(Struct, frozen=True):
    blocks: tuple[Block, ...]


class Leak(Struct, frozen=True):
    address: Address
    reason: str
    releases_in_s: float | None = None

    def row(self) -> tuple[str, ...]:
        when = "-" if self.releases_in_s is None else f"in {lasting(self.releases_in_s)}"
        one = self.address
        return (one.ip, one.who(), one.node, when, self.reason)


class Leaks(Struct, frozen=True):
    leaks: tuple[Leak, ...]
