"""A node's own part of its blocks: what it hands out by itself, as a log of what happened.

    choose ──► Took ──► on disk ──► the endpoint has its addresses
                            └─► pending ──► in the store ──► Told

`Local` is what the events add up to; the caller writes an event to disk before it acts on it, and
after a crash applies them again. Only the node hands out of a window, so two nodes cannot meet in
one however long they do not hear of each other. A window never grows. It is narrowed first here,
then in the store: what it gives up is handed out by nobody in between.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from msgspec import Struct

from ipam.allocate import sparse
from ipam.block import Block, Family, address_text, family_of, parse_address, parse_block
from ipam.keys import Owner, PoolRecord, defined
from ipam.pool import DEFAULT_POOL, Pool, chosen
from ipam.ranges import Ranges, around

# Fewer free addresses than this in a pool's windows: another window is asked for.
LOW = 8
EMPTY_FOR_S = 60.0
# A pool that nobody has asked for so long needs no window.
ASKED_FOR_S = 600.0

Who = tuple[str, str, str]


# ------------------------------------------------------------------ what happens


class Gained(Struct, frozen=True, tag=True, array_like=True):
    """A window, with what the store knows to be in use there or resting; the node may have lost its
    disk. `taken`: owner and address."""

    pool: str
    block: str
    generation: int
    size: int
    taken: tuple[tuple[Owner, str], ...]
    cooling: tuple[str, ...]
    at: float


class Narrowed(Struct, frozen=True, tag=True, array_like=True):
    pool: str
    block: str
    size: int


class Gone(Struct, frozen=True, tag=True, array_like=True):
    """The window is nobody's, or another's."""

    pool: str
    block: str


class Took(Struct, frozen=True, tag=True, array_like=True):
    """`known`: the store has it already."""

    owner: Owner
    pool: str
    ips: tuple[str, ...]
    at: float
    known: bool = False


class Freed(Struct, frozen=True, tag=True, array_like=True):
    """Of an owner's key; addresses rest for the cool-down."""

    owner: Owner
    at: float


class Told(Struct, frozen=True, tag=True, array_like=True):
    """The store has the first so many of what was pending."""

    count: int


class Heard(Struct, frozen=True, tag=True, array_like=True):
    """The service answered."""

    pools: dict[str, PoolRecord]
    node_gone_s: int
    cooldown_s: int
    at: float


class Saved(Struct, frozen=True, tag=True, array_like=True):
    """Everything that came before. `windows`: pool, block, generation, size. `held`: owner, pool,
    addresses. `cooling`: pool, address, until. `pending`: as `held`, then released, at."""

    heard: Heard | None
    windows: tuple[tuple[str, str, int, int], ...]
    held: tuple[tuple[Owner, str, tuple[str, ...]], ...]
    cooling: tuple[tuple[str, str, float], ...]
    pending: tuple[tuple[Owner, str, tuple[str, ...], bool, float], ...]


Event = Saved | Gained | Narrowed | Gone | Took | Freed | Told | Heard


# ------------------------------------------------------------------ what it adds up to


@dataclass(frozen=True, slots=True)
class Window:
    pool: str
    block: Block
    generation: int
    size: int

    def __contains__(self, address: int) -> bool:
        return self.block.base <= address < self.block.base + self.size


@dataclass(frozen=True, slots=True)
class Holding:
    """`uid` is the owner's."""

    owner: Owner
    pool: str
    addresses: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """What the store has yet to be told."""

    holding: Holding
    released: bool
    at: float


@dataclass(slots=True)
class Local:
    """`pools` by name, as the service gave them last. `asked`: when an endpoint last wanted one of
    a pool; not kept on disk."""

    pools: dict[str, Pool] = field(default_factory=dict)
    heard: Heard | None = None
    windows: dict[tuple[str, Block], Window] = field(default_factory=dict)
    held: dict[Who, Holding] = field(default_factory=dict)
    used: dict[tuple[str, int], Who] = field(default_factory=dict)
    cooling: dict[tuple[str, int], float] = field(default_factory=dict)
    pending: list[Entry] = field(default_factory=list)
    asked: dict[str, float] = field(default_factory=dict)

    # -------------------------------------------------------------- events

    def apply(self, event: Event) -> None:
        match event:
            case Took():
                self._take(
                    Holding(event.owner, event.pool, _parsed(event.ips)),
                    event.at,
                    known=event.known,
                )
            case Freed(owner, at):
                self._free(owner, at)
            case Told(count):
                del self.pending[:count]
            case Gained():
                self._gain(event)
            case Narrowed(pool, text, size):
                key = (pool, parse_block(text))
                known = self.windows.get(key)
                if known is not None:
                    self.windows[key] = Window(pool, known.block, known.generation, size)
            case Gone(pool, text):
                self.windows.pop((pool, parse_block(text)), None)
            case Heard():
                self._hear(event)
            case Saved():
                self._restore(event)

    def _hear(self, event: Heard) -> None:
        self.heard = event
        self.pools = {name: defined(name, record) for name, record in event.pools.items()}

    def _restore(self, saved: Saved) -> None:
        if saved.heard is not None:
            self._hear(saved.heard)
        for pool, text, generation, size in saved.windows:
            block = parse_block(text)
            self.windows[pool, block] = Window(pool, block, generation, size)
        for owner, pool, ips in saved.held:
            self._take(Holding(owner, pool, _parsed(ips)), 0.0, known=True)
        self.cooling = {(pool, parse_address(ip)): until for pool, ip, until in saved.cooling}
        self.pending = [
            Entry(Holding(owner, pool, _parsed(ips)), released, at)
            for owner, pool, ips, released, at in saved.pending
        ]

    def saved(self) -> Saved:
        return Saved(
            self.heard,
            tuple((w.pool, str(w.block), w.generation, w.size) for w in self.windows.values()),
            tuple((h.owner, h.pool, _texts(h.addresses)) for h in self.held.values()),
            tuple((pool, address_text(a), until) for (pool, a), until in self.cooling.items()),
            tuple(
                (e.holding.owner, e.holding.pool, _texts(e.holding.addresses), e.released, e.at)
                for e in self.pending
            ),
        )

    def _take(self, holding: Holding, at: float, *, known: bool) -> None:
        who = who_is(holding.owner)
        before = self.held.get(who)
        if before is not None and before.owner.uid == holding.owner.uid:
            both = tuple(sorted({*before.addresses, *holding.addresses}))
            holding = Holding(holding.owner, holding.pool, both)
        self.held[who] = holding
        for address in holding.addresses:
            self.used[holding.pool, address] = who
            self.cooling.pop((holding.pool, address), None)
        if not known:
            self.pending.append(Entry(holding, False, at))

    def _free(self, owner: Owner, at: float) -> None:
        holding = self.held.pop(who_is(owner), None)
        if holding is None:
            return
        for address in holding.addresses:
            self.used.pop((holding.pool, address), None)
            self.cooling[holding.pool, address] = at + self._cooldown_s(holding.pool)
        self.pending.append(Entry(holding, True, at))

    def _gain(self, event: Gained) -> None:
        block = parse_block(event.block)
        self.windows[event.pool, block] = Window(event.pool, block, event.generation, event.size)
        for owner, ip in event.taken:
            self._take(Holding(owner, event.pool, (parse_address(ip),)), event.at, known=True)
        for ip in event.cooling:
            self.cooling[event.pool, parse_address(ip)] = event.at + self._cooldown_s(event.pool)

    # -------------------------------------------------------------- decisions

    def choose(
        self, owner: Owner, pool_named: str, wanted: Collection[int], now_s: float
    ) -> Holding | Took | None:
        """What the owner has; what it may take once that is on disk; None: the service decides.
        `wanted`: static addresses, which are given only when they are in a window."""
        known = self.held.get(who_is(owner))
        if known is not None and known.owner.uid == owner.uid:
            return known
        pool = self.pools.get(chosen(self.pools.values(), owner.namespace, pool_named))
        if pool is None or known is not None or not self.trusted(now_s):
            return None
        self.asked[pool.name] = now_s
        static = {family_of(address): address for address in wanted}
        picked = []
        for family in sorted({*pool.families, *static}):
            address = (
                self._if_free(pool, static[family], now_s)
                if family in static
                else self._pick(pool, family, owner, now_s)
            )
            if address is None:
                return None
            picked.append(address_text(address))
        return Took(owner, pool.name, tuple(picked), now_s)

    def trusted(self, now_s: float) -> bool:
        """A node that the service may have given up meanwhile hands out nothing new. Half the time,
        because the clocks of two machines need not agree."""
        heard = self.heard
        return heard is not None and 0 <= now_s - heard.at < heard.node_gone_s / 2

    def wishes(self, now_s: float) -> list[tuple[str, Family]]:
        """Pools in use here whose windows run low."""
        return [
            (pool.name, family)
            for pool in self.pools.values()
            if pool.local and self._in_use(pool.name, now_s)
            for family in pool.families
            if self.free(pool, family, now_s) < LOW
        ]

    def free(self, pool: Pool, family: Family, now_s: float, apart: Window | None = None) -> int:
        """Counted no further than needed; without those of the window `apart`."""
        count = 0
        for window in self._windows(pool.name, family):
            if window == apart:
                continue
            for _ in self._free_in(pool, window, 0, now_s):
                count += 1
                if count >= LOW:
                    return count
        return count

    def narrowest(self, window: Window, now_s: float) -> int:
        """The size that the window needs for what is in use in it, or resting."""
        self._warm(now_s)
        return max(
            (
                address - window.block.base + 1
                for pool, address in (*self.used, *self.cooling)
                if pool == window.pool and address in window
            ),
            default=0,
        )

    def surplus(self, empty_since: dict[tuple[str, Block], float], now_s: float) -> Window | None:
        """One that stood empty for a minute and is not needed for the next endpoints.
        `empty_since` is kept between calls."""
        for key, window in self.windows.items():
            if window.size == 0 or self.narrowest(window, now_s):
                empty_since.pop(key, None)
                continue
            since = empty_since.setdefault(key, now_s)
            if now_s - since >= EMPTY_FOR_S and not self._needed(window, now_s):
                return window
        return None

    # -------------------------------------------------------------- inside

    def _needed(self, window: Window, now_s: float) -> bool:
        pool = self.pools.get(window.pool)
        if pool is None or not self._in_use(pool.name, now_s):
            return False
        return self.free(pool, window.block.family, now_s, apart=window) < LOW

    def _in_use(self, name: str, now_s: float) -> bool:
        return (
            name == DEFAULT_POOL
            or now_s - self.asked.get(name, -ASKED_FOR_S) < ASKED_FOR_S
            or any(holding.pool == name for holding in self.held.values())
        )

    def _cooldown_s(self, name: str) -> float:
        pool = self.pools.get(name)
        if pool is not None and pool.cooldown_s is not None:
            return pool.cooldown_s
        return self.heard.cooldown_s if self.heard is not None else 0

    def _windows(self, pool: str, family: Family) -> Iterator[Window]:
        for (name, block), window in self.windows.items():
            if name == pool and block.family is family and window.size:
                yield window

    def _pick(self, pool: Pool, family: Family, owner: Owner, now_s: float) -> int | None:
        """IPv4 from the bottom, which keeps windows narrow; IPv6 where the owner's hash says."""
        spread = 0
        if family is Family.V6:
            spread = sparse(owner.namespace, owner.name, owner.interface)
        for window in self._windows(pool.name, family):
            for address in self._free_in(pool, window, spread % window.size, now_s):
                return address
        return None

    def _if_free(self, pool: Pool, address: int, now_s: float) -> int | None:
        for window in self._windows(pool.name, family_of(address)):
            if address in window:
                at = address - window.block.base
                return next(
                    (a for a in self._free_in(pool, window, at, now_s, 1) if a == address), None
                )
        return None

    def _free_in(
        self, pool: Pool, window: Window, start: int, now_s: float, steps: int = 0
    ) -> Iterator[int]:
        """From offset `start`, around the end."""
        lost: Ranges = pool.lost
        for step in range(steps or window.size):
            address = window.block.base + (start + step) % window.size
            key = (pool.name, address)
            if key in self.used or self.cooling.get(key, 0.0) > now_s:
                continue
            if around(lost, address) is None:
                yield address

    def _warm(self, now_s: float) -> None:
        over = [key for key, until in self.cooling.items() if until <= now_s]
        for key in over:
            del self.cooling[key]


def _parsed(ips: Iterable[str]) -> tuple[int, ...]:
    return tuple(map(parse_address, ips))


def _texts(addresses: Iterable[int]) -> tuple[str, ...]:
    return tuple(map(address_text, addresses))


def who_is(owner: Owner) -> Who:
    return owner.namespace, owner.name, owner.interface
