from __future__ import annotations

import asyncio

import pytest

from services.runtime.errors import Invalid, Retry, Unusable
from services.runtime.tasks import Background, restarting
from tests.fakes.clock import FakeClock


class Owner:
    def __init__(self) -> None:
        self.background = Background()
        self.ended: list[str] = []

    async def forever(self, name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.append(name)

    async def fail(self) -> None:
        raise ValueError("a bug")

    async def __aenter__(self) -> Owner:
        await self.background.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.background.close(exc[1] if isinstance(exc[1], BaseException) else None)


async def test_tasks_end_with_their_owner() -> None:
    async with Owner() as owner:
        owner.background.start(owner.forever("a"), name="a")
        owner.background.start(owner.forever("b"), name="b")
        await asyncio.sleep(0)
    assert sorted(owner.ended) == ["a", "b"]


async def test_the_error_of_the_body_comes_out_unwrapped() -> None:
    owner = Owner()

    async def body() -> None:
        async with owner:
            owner.background.start(owner.forever("a"), name="a")
            await asyncio.sleep(0)
            raise Invalid("mine")

    with pytest.raises(Invalid, match="mine"):
        await body()
    assert owner.ended == ["a"]


async def test_a_failing_task_ends_the_body() -> None:
    owner = Owner()

    async def body() -> None:
        async with owner:
            owner.background.start(owner.forever("a"), name="a")
            owner.background.start(owner.fail(), name="bug")
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        await body()
    assert caught.group_contains(ValueError, match="a bug")
    assert owner.ended == ["a"]


async def test_cancelling_the_body_cancels_the_tasks() -> None:
    owner = Owner()

    async def body() -> None:
        async with owner:
            owner.background.start(owner.forever("a"), name="a")
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(body())
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
    assert task.cancelled()
    assert owner.ended == ["a"]


async def test_closing_twice_is_harmless() -> None:
    async with Owner() as owner:
        await owner.background.close()


async def test_a_task_of_a_closed_owner_is_refused() -> None:
    owner = Owner()
    with pytest.raises(RuntimeError, match="outside its `async with`"):
        owner.background.start(owner.forever("a"), name="a")


async def test_an_activity_is_restarted_with_growing_pauses() -> None:
    clock = FakeClock()
    started: list[float] = []

    async def activity() -> None:
        started.append(clock.monotonic_s())
        if len(started) == 2:
            raise Retry("the store is away")
        if len(started) < 5:
            raise ValueError("a bug")

    async with asyncio.TaskGroup() as group:
        group.create_task(restarting("it", activity, clock, first_pause_s=1.0, longest_pause_s=4.0))
        await clock.advance(100)
    assert started == [0.0, 1.0, 3.0, 7.0, 11.0]


async def test_pauses_start_over_after_a_long_run() -> None:
    clock = FakeClock()
    started: list[float] = []

    async def activity() -> None:
        started.append(clock.monotonic_s())
        if len(started) == 3:
            await clock.sleep(50)
        if len(started) < 5:
            raise Retry("again")

    async with asyncio.TaskGroup() as group:
        group.create_task(
            restarting("it", activity, clock, first_pause_s=1.0, longest_pause_s=30.0)
        )
        await clock.advance(200)
    assert started == [0.0, 1.0, 3.0, 54.0, 56.0]


async def test_what_trying_again_cannot_cure_is_let_through() -> None:
    async def activity() -> None:
        raise Unusable("no bpffs")

    with pytest.raises(Unusable):
        await restarting("it", activity, FakeClock())
