"""What the agent does for the node as a whole, not for one endpoint: routes to other nodes.

stream's addresses ──► Remote ──► routes
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from datapath.agent.hostfirewall import HostFirewall
from datapath.agent.remote import Peers, Remote, Ways
from datapath.agent.tracking import Tracking
from datapath.agent.underlay import Underlay
from datapath.agent.view import View, ViewChange
from datapath.maps.tables import Tables
from datapath.routes import Router
from identity.numbers import HOST, NumericIdentity
from services.runtime.clock import Clock
from services.runtime.config import AgentConfig


class Node:
    """`here`: the addresses of this machine."""

    def __init__(
        self,
        config: AgentConfig,
        view: View,
        here: Collection[str],
        underlay: Underlay,
        tables: Tables,
        firewall: HostFirewall,
        clock: Clock,
    ) -> None:
        self.firewall = firewall
        self.tracking = Tracking(tables.ct, clock)
        self.tracking.observe()
        tunnelled = underlay.overlay != 0
        ways = Ways(view, {config.node_name, *here}, here.__contains__, tunnelled=tunnelled)
        self.remote = Remote(ways, view, Router(config.node_name, underlay.overlay), clock)
        self._routed = config.routing != "none"
        self._peers = Peers(view, tables.nodes, here) if tunnelled else None

    def follow(self, change: ViewChange) -> None:
        """Call when `change` is in the tables."""
        self.remote.follow(change)
        if self._peers is not None:
            self._peers.follow(change)
        self.firewall.place()

    async def run(self, want: Callable[[NumericIdentity], None]) -> None:
        """Until cancelled. `want` asks for an identity's policy."""
        if self.firewall.wanted:
            want(HOST)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.tracking.run())
            if self._routed:
                group.create_task(self.remote.run())

    def report(self) -> dict[str, object]:
        return {
            "host_firewall": self.firewall.state,
            "flows": {"tracked": self.tracking.entries, "fill": round(self.tracking.fill, 3)},
            "routes": {"held": self.remote.count, "refused": len(self.remote.refused)},
        }
