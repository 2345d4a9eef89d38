"""The last changes of identities, for whoever follows them; with a place to go on from.

A follower that was away longer than the history reaches, or comes from before this process
started, is told so and reads the list anew.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.store.model import Revision

# 13 s of allocating as fast as can be, two changes each; some 10 MB.
HISTORY: Final = 65_536


class ChangeKind(Enum):
    CREATED = "created"
    DELETED = "deleted"
    REFERENCED = "referenced"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Change:
    """`node`: of REFERENCED and RELEASED."""

    revision: Revision
    kind: ChangeKind
    number: NumericIdentity
    labels: Labels
    node: str = ""


class Feed:
    def __init__(self) -> None:
        self._history: deque[Change] = deque(maxlen=HISTORY)
        self._forgotten = Revision(0)
        self._news = asyncio.Event()

    def begin(self, revision: Revision) -> None:
        """Nothing before or at `revision` is in the history."""
        self._history.clear()
        self._forgotten = revision
        self._wake()

    def add(self, change: Change) -> None:
        if len(self._history) == HISTORY:
            self._forgotten = self._history[0].revision
        self._history.append(change)

    def flush(self) -> None:
        """A batch of changes is complete; batches end between transactions."""
        if self._history:
            self._wake()

    def since(self, revision: Revision) -> list[Change] | None:
        """Changes after `revision`, oldest first; None when some of them are forgotten."""
        if revision < self._forgotten:
            return None
        found: list[Change] = []
        for change in reversed(self._history):
            if change.revision <= revision:
                break
            found.append(change)
        found.reverse()
        return found

    async def follow(self, revision: Revision) -> AsyncIterator[list[Change]]:
        """Batches after `revision`; ends when changes were forgotten before they were read."""
        while True:
            news = self._news
            found = self.since(revision)
            if found is None:
                return
            if found:
                revision = found[-1].revision
                yield found
            else:
                await news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
