"""Many simulated nodes in one process, to load a control plane: `tessera simnode --count 1000`.

    SimNode ──► own connection to a policyd ──► SharedDecoder
       └──────► Session on one connection to identityd for all

Nothing of the kernel is touched, and no root is needed. What stands on the node's side of the
control plane is the agent's own code.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import resource
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tessera_wire.identity.v1.identity_pb2_grpc import IdentityServiceStub

from datapath.agent.enforcement import Realised
from datapath.agent.session import Session
from datapath.agent.subscribe import Door
from datapath.simnode.node import Identities, SimEndpoint, SimNode
from datapath.simnode.shared import SharedDecoder
from services.runtime import config as configuration
from services.runtime.clock import Clock, SystemClock
from services.runtime.config import AgentConfig, targets
from services.runtime.errors import Exhausted, TesseraError
from services.runtime.log import logger
from services.runtime.process import run
from services.wire.client import channel

if TYPE_CHECKING:
    from tessera_wire.identity.v1.identity_pb2_grpc import IdentityServiceAsyncStub

log = logger(__name__)

NODE_NETWORK: Final = IPv4Network("172.16.0.0/12")
ENDPOINT_NETWORK: Final = IPv4Network("100.64.0.0/10")
REPORT_S: Final = 5.0
# A connection, and what a process needs besides.
_FILES_PER_NODE: Final = 2
_FILES: Final = 256


@dataclass(frozen=True, slots=True)
class Plan:
    """`first`: the number of the first node, so that several processes make different ones.
    `apps`: how many label sets the endpoints of all nodes have."""

    count: int
    first: int = 0
    endpoints: int = 10
    apps: int = 100
    namespace: str = "sim"

    def name(self, at: int) -> str:
        return f"sim-{self.first + at:05}"

    def ip(self, at: int) -> str:
        return str(NODE_NETWORK[self.first + at + 1])

    def endpoints_of(self, at: int) -> list[SimEndpoint]:
        """Neighbours in number are of different applications; each has its nodes all over."""
        start = (self.first + at) * self.endpoints
        return [
            SimEndpoint(
                name=f"e{number}",
                labels=(
                    f"k8s:app=sim-{number % self.apps}",
                    f"k8s:io.kubernetes.pod.namespace={self.namespace}",
                ),
                address=str(ENDPOINT_NETWORK[number + 1]),
                namespace=self.namespace,
            )
            for number in range(start, start + self.endpoints)
        ]


class Fleet:
    """The nodes of one process."""

    def __init__(
        self,
        plan: Plan,
        config: AgentConfig,
        clock: Clock,
        on_realised: Callable[[SimNode, Realised], None] = lambda node, realised: None,
    ) -> None:
        self._on_realised = on_realised
        self.plan = plan
        self._config = config
        self._clock = clock
        self.decoder = SharedDecoder()
        self.nodes: list[SimNode] = []

    async def run(self) -> None:
        """Until cancelled."""
        async with AsyncExitStack() as stack:
            to_identityd = await stack.enter_async_context(channel(self._config.identityd))
            stub = IdentityServiceStub(to_identityd)
            async with asyncio.TaskGroup() as group:
                for at in range(self.plan.count):
                    doors = [
                        Door(one, self.decoder.stub(await stack.enter_async_context(channel(one))))
                        for one in targets(self._config.policyd)
                    ]
                    identities, running = self.identities(at, stub)
                    self.nodes.append(self._node(at, identities, doors))
                    if running is not None:
                        group.create_task(running)
                    group.create_task(self.nodes[-1].run())
                group.create_task(self._report())

    def identities(
        self, at: int, stub: IdentityServiceAsyncStub
    ) -> tuple[Identities, Coroutine[None, None, None] | None]:
        """Of one node, and what runs along with them."""

        async def nothing() -> None:
            """The lease is not written down: a simulated node has no disk."""

        session = Session(
            stub,
            node=self.plan.name(at),
            node_ip=self.plan.ip(at),
            previous_lease=0,
            republish=lambda: self.nodes[at].republish(),
            on_lease=nothing,
            held=lambda: self.plan.endpoints,
            clock=self._clock,
            jitter=random.Random(),
        )
        return session, session.run()

    def _node(self, at: int, identities: Identities, doors: Sequence[Door]) -> SimNode:
        return SimNode(
            self.plan.name(at),
            self.plan.ip(at),
            self.plan.endpoints_of(at),
            doors,
            identities=identities,
            clock=self._clock,
            jitter=random.Random(),
            decode=self.decoder.decode,
            on_realised=self._on_realised,
        )

    async def _report(self) -> None:
        started_s = self._clock.monotonic_s()
        complete = False
        while True:
            await self._clock.sleep(0.1 if not complete else REPORT_S)
            enforcing = sum(node.enforcing for node in self.nodes)
            if complete or enforcing == len(self.nodes):
                state = "all enforce" if not complete else "running"
                complete = True
                self._tell(state, enforcing, self._clock.monotonic_s() - started_s)

    def _tell(self, state: str, enforcing: int, since_s: float) -> None:
        revisions = [node.subscription.realised.revision for node in self.nodes]
        log.info(
            "simnode.state",
            state=state,
            took_s=round(since_s, 2),
            connected=sum(node.subscription.connected for node in self.nodes),
            enforcing=enforcing,
            lowest=min(revisions),
            highest=max(revisions),
            messages=self.decoder.messages,
            bytes=self.decoder.bytes_received,
        )


def allow_files(nodes: int, replicas: int) -> None:
    """Raises `Exhausted` when the system allows fewer connections."""
    wanted = _FILES + nodes * replicas * _FILES_PER_NODE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise Exhausted(
            f"{nodes} nodes need {wanted} open files, the limit is {hard}; start several processes"
            " (--first) or raise it (ulimit -n)"
        )
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tessera simnode")
    parser.add_argument("--config", type=Path, metavar="FILE")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--endpoints", type=int, default=10)
    parser.add_argument("--apps", type=int, default=100)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    given = arguments(argv)
    plan = Plan(given.count, given.first, given.endpoints, given.apps)
    try:
        config = configuration.load(AgentConfig, "agent", given.config, os.environ)
        allow_files(plan.count, len(targets(config.policyd)))
    except TesseraError as error:
        print(f"tessera simnode: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    run("simnode", config, Fleet(plan, config, SystemClock()).run)


if __name__ == "__main__":
    main(sys.argv[1:])
