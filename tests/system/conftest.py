"""Two workloads on the module's `stack`: front, who asks, and api, who is asked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.netns import Namespace, namespace
from tests.fakes.stack import Stack


@pytest.fixture
def front(stack: Stack) -> Iterator[Namespace]:
    with namespace() as made:
        stack.add(made, "front", app="front")
        yield made
        stack.remove("front")


@pytest.fixture
def api(stack: Stack) -> Iterator[Namespace]:
    with namespace() as made:
        stack.add(made, "api", app="api")
        yield made
        stack.remove("api")


@pytest.fixture
def address(stack: Stack, api: Namespace) -> str:
    """Of api."""
    return str(next(e["ip"] for e in stack.endpoints() if e["name"] == "api"))
