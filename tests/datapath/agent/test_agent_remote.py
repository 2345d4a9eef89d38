"""Ways to endpoints of other nodes: what the stream says in, routes out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from datapath.agent.remote import RETRY_S, Remote, Ways
from datapath.agent.view import Address, Update, View
from identity.numbers import REMOTE_NODE, NumericIdentity
from services.runtime.clock import SystemClock
from tests.fakes.node_agent import until

POD = "10.244.3.7"
ID = NumericIdentity(1234)


def node(ip: str, name: str) -> Address:
    return Address(ip, REMOTE_NODE, name)


def pod(ip: str, where: str) -> Address:
    return Address(ip, ID, where, "shop", "web")


def ways(*batches: Iterable[Address], removed: tuple[str, ...] = ()) -> tuple[View, Ways]:
    view = View()
    found = Ways(view, ("here", "192.0.2.1"), lambda ip: ip == "192.0.2.1")
    for number, batch in enumerate(batches, 1):
        view.apply([Update(number, addresses=tuple(batch))])
        found.learn(view.addresses)
    if removed:
        view.apply([Update(99, addresses_removed=removed)])
        found.learn(removed)
    return view, found


def test_the_way_to_an_endpoint_is_its_node() -> None:
    _, found = ways([node("192.0.2.2", "b"), pod(POD, "b")])
    assert found.gateway(POD) == "192.0.2.2"


def test_a_node_that_nobody_named_goes_by_its_address() -> None:
    _, found = ways([pod(POD, "192.0.2.2")])
    assert found.gateway(POD) == "192.0.2.2"


def test_an_endpoint_known_before_its_node_gets_its_way_with_the_node() -> None:
    view, found = ways([pod(POD, "b")])
    assert found.gateway(POD) is None
    view.apply([Update(2, addresses=(node("192.0.2.2", "b"),))])
    assert POD in found.learn(["192.0.2.2"])
    assert found.gateway(POD) == "192.0.2.2"


def test_a_node_that_moves_takes_its_endpoints_along() -> None:
    view, found = ways([node("192.0.2.2", "b"), pod(POD, "b")])
    view.apply([Update(2, addresses=(node("192.0.2.9", "b"),), addresses_removed=("192.0.2.2",))])
    assert POD in found.learn(["192.0.2.2", "192.0.2.9"])
    assert found.gateway(POD) == "192.0.2.9"


def test_nothing_leads_to_this_node_to_nodes_or_to_prefixes() -> None:
    prefix = Address("10.0.0.0/8", ID, "b")
    _, found = ways(
        [node("192.0.2.2", "b"), prefix, pod(POD, "here"), pod("10.1.1.1", "192.0.2.1")]
    )
    for cidr in (POD, "10.1.1.1", "192.0.2.2", "10.0.0.0/8"):
        assert found.gateway(cidr) is None


def test_a_way_keeps_to_the_family_of_its_address() -> None:
    rows = [node("192.0.2.2", "b"), node("2001:db8::2", "b"), pod(POD, "b"), pod("fd00::7", "b")]
    _, found = ways(rows)
    assert (found.gateway(POD), found.gateway("fd00::7")) == ("192.0.2.2", "2001:db8::2")


def test_an_endpoint_that_is_gone_has_no_way() -> None:
    _, found = ways([node("192.0.2.2", "b"), pod(POD, "b")], removed=(POD,))
    assert found.gateway(POD) is None


class Kernel:
    """`unreachable`: gateways it refuses."""

    def __init__(self, routes: dict[str, str], unreachable: set[str]) -> None:
        self.routes = routes
        self.unreachable = unreachable

    def held(self) -> dict[str, str]:
        return dict(self.routes)

    def put(self, routes: Mapping[str, str]) -> dict[str, str]:
        refused = {d: "Network is unreachable" for d, g in routes.items() if g in self.unreachable}
        self.routes |= {d: g for d, g in routes.items() if d not in refused}
        return refused

    def drop(self, destinations: Iterable[str]) -> None:
        for destination in destinations:
            del self.routes[destination]


class Hurried(SystemClock):
    """A pause is over at once, and a retry is always due."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def monotonic_s(self) -> float:
        self._now_s += RETRY_S
        return self._now_s

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


async def test_routes_of_an_earlier_run_stay_until_the_stream_has_spoken_and_then_fit() -> None:
    view, found = ways()
    kernel = Kernel({POD: "192.0.2.2", "10.9.9.9": "192.0.2.2"}, {"192.0.2.3"})
    remote = Remote(found, view, kernel, Hurried())
    async with asyncio.TaskGroup() as group:
        running = group.create_task(remote.run())
        await asyncio.sleep(0)
        assert kernel.routes == {POD: "192.0.2.2", "10.9.9.9": "192.0.2.2"}
        batch = (
            node("192.0.2.2", "b"),
            node("192.0.2.3", "c"),
            pod(POD, "b"),
            pod("10.1.1.1", "c"),
        )
        remote.follow(view.apply([Update(1, addresses=batch)]))
        await until(lambda: kernel.routes == {POD: "192.0.2.2"})
        await until(lambda: "10.1.1.1" in remote.refused)
        kernel.unreachable.clear()
        remote.follow(view.apply([Update(2, addresses=(pod("10.1.1.2", "b"),))]))
        await until(lambda: kernel.routes.get("10.1.1.1") == "192.0.2.3")
        await until(lambda: not remote.refused)
        running.cancel()
