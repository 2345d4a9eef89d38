"""A node and its windows, without gRPC and disk: what datapath.agent.addressing does, step by step,
so that a test can put other steps in between."""

from __future__ import annotations

from ipam.block import address_text
from ipam.keys import Owner
from ipam.window import Freed, Gained, Gone, Heard, Holding, Local, Narrowed, Told, Took, who_is
from services.ipamd.journal import Entry
from services.ipamd.transactions import record_of
from services.ipamd.windows import Window
from services.runtime.clock import Clock
from tests.fakes.address_service import Replica


class WindowNode:
    """`local` is what it has on disk."""

    def __init__(self, name: str, clock: Clock, node_gone_s: int = 3600) -> None:
        self.name = name
        self.clock = clock
        self.node_gone_s = node_gone_s
        self.local = Local()
        self.lost: list[str] = []

    def owner(self, name: str) -> Owner:
        return Owner("shop", name, "eth0", f"{self.name}.{name}")

    def take(self, name: str, pool: str = "") -> str | None:
        """The addresses with commas between; None: no window has one."""
        chosen = self.local.choose(self.owner(name), pool, (), self.clock.now_s())
        if isinstance(chosen, Took):
            self.local.apply(chosen)
            return ",".join(chosen.ips)
        if isinstance(chosen, Holding):
            return ",".join(map(address_text, chosen.addresses))
        return None

    def free(self, name: str) -> None:
        self.local.apply(Freed(self.owner(name), self.clock.now_s()))

    async def sync(self, replica: Replica, *, wishing: bool = True) -> None:
        local, now_s = self.local, self.clock.now_s()
        await replica.windows.heard(self.name, "disk", ())
        held = [Window(w.pool, w.block, w.generation, w.size) for w in local.windows.values()]
        wishes = local.wishes(now_s) if wishing else []
        answer = await replica.windows.sync(self.name, held, wishes)
        pools = {pool.name: record_of(pool) for pool in replica.view.pools()}
        local.apply(Heard(pools, self.node_gone_s, 0, now_s))
        for window in answer.gone + tuple(w for w in answer.confirmed if not w.size):
            known = local.windows.get((window.pool, window.block))
            if known is not None and known.generation == window.generation:
                local.apply(Gone(window.pool, str(window.block)))
        for given in answer.given:
            window = given.window
            if (window.pool, window.block) not in local.windows:
                taken = tuple((row.owner, address_text(row.address)) for row in given.taken)
                cooling = tuple(map(address_text, given.cooling))
                block = str(window.block)
                local.apply(
                    Gained(
                        window.pool, block, window.generation, window.size, taken, cooling, now_s
                    )
                )
        for window in answer.recalled:
            known = local.windows.get((window.pool, window.block))
            if known is not None and known.generation == window.generation:
                size = min(known.size, local.narrowest(known, now_s))
                local.apply(Narrowed(window.pool, str(window.block), size))

    async def tell(self, replica: Replica) -> None:
        entries = tuple(self.local.pending)
        sent = [
            Entry(e.holding.owner, e.holding.pool, e.holding.addresses, e.released, e.at)
            for e in entries
        ]
        self.lost += filter(None, await replica.replayer.replay(self.name, sent))
        # What came meanwhile is behind them.
        self.local.apply(Told(len(entries)))

    async def report(self, replica: Replica) -> tuple[int, int]:
        held = {who: frozenset(h.addresses) for who, h in self.local.held.items()}
        return await replica.collector.report(self.name, held)

    def has(self) -> dict[str, str]:
        return {
            str(holding.owner): ",".join(map(address_text, sorted(holding.addresses)))
            for holding in self.local.held.values()
        }

    def forget(self, name: str) -> None:
        """As an agent that crashed and lost the endpoint: nobody is told."""
        holding = self.local.held.pop(who_is(self.owner(name)))
        for address in holding.addresses:
            self.local.used.pop((holding.pool, address), None)
