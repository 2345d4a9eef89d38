"""What every test needs."""

from __future__ import annotations

import asyncio

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # The looptime plugin asks for the current loop before a synchronous test too. Unless told that
    # there is none, asyncio makes one, nobody closes it, and a later test fails on the warning.
    asyncio.set_event_loop(None)
