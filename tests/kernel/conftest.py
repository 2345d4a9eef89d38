from __future__ import annotations

from collections.abc import Iterator

import pytest

from datapath.maps.layout import EventType
from tests.fakes.kernel_node import EVERY_ROLE, KernelNode, Workload
from tests.fakes.packets import DROPPED


@pytest.fixture(scope="session")
def shared_node() -> Iterator[KernelNode]:
    node = KernelNode.start("shared", roles=EVERY_ROLE)
    try:
        node.add("10.78.0.11", 1001)
        node.add("10.78.0.12", 1002)
        yield node
    finally:
        node.stop()


@pytest.fixture
def node(shared_node: KernelNode) -> KernelNode:
    """Two workloads, everything open, nothing remembered."""
    shared_node.reset()
    return shared_node


@pytest.fixture
def alice(node: KernelNode) -> Workload:
    return node.workloads[0]


@pytest.fixture
def bob(node: KernelNode) -> Workload:
    return node.workloads[1]


def dropped_with(node: KernelNode, w: Workload, packet: bytes) -> int:
    """The reason; 0: it passed."""
    node.events()
    result = node.inject(w, packet)
    drops = node.events(EventType.DROP)
    assert (result == DROPPED) == bool(drops)
    return drops[0].reason if drops else 0
