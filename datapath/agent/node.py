"""What the agent does for the node as a whole, not for one endpoint: routes to other nodes.

stream's addresses ──► Remote ──► routes
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from datapath.agent.remote import Remote, Ways
from datapath.agent.view import View, ViewChange
from datapath.routes import Router
from services.runtime.clock import Clock
from services.runtime.config import AgentConfig


class Node:
    """`own`: the addresses of this machine."""

    def __init__(
        self, config: AgentConfig, view: View, own: Collection[str], node_ip: str, clock: Clock
    ) -> None:
        here = {node_ip, *own}
        ways = Ways(view, (config.node_name, node_ip), here.__contains__)
        self.remote = Remote(ways, view, Router(config.node_name), clock)
        self._routed = config.routing == "direct"

    def follow(self, change: ViewChange) -> None:
        """Call when `change` is in the tables."""
        self.remote.follow(change)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            if self._routed:
                group.create_task(self.remote.run())

    def report(self) -> dict[str, object]:
        return {
            "routes": {"held": self.remote.count, "refused": len(self.remote.refused)},
        }
