"""Tasks with a parent.

`Background` is the TaskGroup of an object that lives in an `async with`; `restarting` keeps one
activity of a process running and is the only place that catches every exception.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Final

from services.runtime.clock import Clock
from services.runtime.errors import Retry, Unusable
from services.runtime.log import logger

log = logger(__name__)

FIRST_PAUSE_S: Final = 0.2
LONGEST_PAUSE_S: Final = 30.0


class Background:
    """A task that fails cancels whoever opened the group, as in any TaskGroup; tasks still running
    at `close` are cancelled and awaited."""

    def __init__(self) -> None:
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_open(self) -> bool:
        return self._group is not None

    async def open(self) -> None:
        group = asyncio.TaskGroup()
        await group.__aenter__()
        self._group = group

    def start(self, coroutine: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        if self._group is None:
            coroutine.close()
            raise RuntimeError(f"task {name!r}: the owner is used outside its `async with`")
        task = self._group.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self, error: BaseException | None = None) -> None:
        """`error` is what the owner's `async with` body ended with. Only a cancellation is handed
        to the group (it may be the group's own, of a failed task); anything else is the caller's
        to raise, unwrapped. Idempotent."""
        if self._group is None:
            return
        group, self._group = self._group, None
        for task in tuple(self._tasks):
            task.cancel()
        kind: type[BaseException] | None = None
        trace: TracebackType | None = None
        if isinstance(error, asyncio.CancelledError):
            kind, trace = type(error), error.__traceback__
        else:
            error = None
        await group.__aexit__(kind, error, trace)


async def restarting(
    name: str,
    activity: Callable[[], Awaitable[None]],
    clock: Clock,
    *,
    first_pause_s: float = FIRST_PAUSE_S,
    longest_pause_s: float = LONGEST_PAUSE_S,
) -> None:
    """Run `activity` until it returns. When it raises, log and run it again after a pause that
    doubles, and starts over once a run outlived the longest pause. `Unusable` is let through:
    trying again cannot help."""
    pause_s = first_pause_s
    while True:
        started_s = clock.monotonic_s()
        try:
            return await activity()
        except Unusable:
            raise
        except Retry as error:
            log.warning("task.retry", name=name, error=str(error), pause_s=pause_s)
        except Exception:
            log.exception("task.failed", name=name, pause_s=pause_s)
        if clock.monotonic_s() - started_s > longest_pause_s:
            pause_s = first_pause_s
        await clock.sleep(pause_s)
        pause_s = min(pause_s * 2, longest_pause_s)
