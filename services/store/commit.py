"""Many small transactions of concurrent calls, committed as few large ones.

    calls ──► queue ──► up to WORKERS at once: take what is queued, up to WIDTH ──► one outer txn

Nothing waits to fill a batch: while the workers are busy the queue fills by itself, and an idle
worker takes a single one at once. Members of a batch succeed and fail alone; siblings never write
the same key. A dead lease fails the outer transaction, so the batch is then tried again per lease.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from services.runtime.errors import NotFound, Retry, TesseraError
from services.runtime.tasks import Background
from services.store.model import NO_LEASE, Delete, LeaseId, Put, Store, Txn, TxnResult

# Measured with etcd 3.4: 64 and 100 perform alike, and 64 leaves the store's limit of 128 room for
# the widest member.
WIDTH: Final = 64
WORKERS: Final = 4
MAX_QUEUED: Final = 200_000

Outcome = TxnResult | TesseraError


class _Call:
    """The transactions of one `submit`."""

    __slots__ = ("done", "left", "outcomes")

    def __init__(self, count: int) -> None:
        self.outcomes: list[Outcome | None] = [None] * count
        self.left = count
        self.done = asyncio.Event()

    def settle(self, at: int, outcome: Outcome) -> None:
        self.outcomes[at] = outcome
        self.left -= 1
        if not self.left:
            self.done.set()


@dataclass(frozen=True, slots=True)
class _Job:
    txn: Txn
    lease: LeaseId
    writes: tuple[str, ...]
    call: _Call
    at: int


class Committer:
    """Used inside `async with`. `width`: transactions in one; `workers`: outer transactions at
    once."""

    def __init__(self, store: Store, *, width: int = WIDTH, workers: int = WORKERS) -> None:
        self._store = store
        self._width = width
        self._most_workers = workers
        self._queue: deque[_Job] = deque()
        self._workers = 0
        self._background = Background()

    async def __aenter__(self) -> Committer:
        await self._background.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._background.close(exc[1] if isinstance(exc[1], BaseException) else None)

    async def one(self, txn: Txn, lease: LeaseId = NO_LEASE) -> TxnResult:
        """Raises what the store raised."""
        (outcome,) = await self.submit((txn,), lease)
        if isinstance(outcome, TesseraError):
            raise outcome
        return outcome

    async def submit(self, txns: Sequence[Txn], lease: LeaseId) -> list[Outcome]:
        """Outcomes in the order given; an error of the store is the outcome of those it hit.

        `lease` is the one that all puts of `txns` name. Raises `Retry` when too much is queued.
        """
        if not txns:
            return []
        if len(self._queue) + len(txns) > MAX_QUEUED:
            raise Retry(f"{len(self._queue)} changes wait for the store; try again later")
        call = _Call(len(txns))
        self._queue.extend(
            _Job(txn, lease, tuple(_written(txn)), call, at) for at, txn in enumerate(txns)
        )
        batches = -(-len(self._queue) // self._width)
        for _ in range(min(batches, self._most_workers - self._workers)):
            self._workers += 1
            self._background.start(self._work(), name="store commit")
        await call.done.wait()
        return [outcome for outcome in call.outcomes if outcome is not None]

    async def _work(self) -> None:
        try:
            while batch := self._take():
                await self._commit(batch)
        finally:
            self._workers -= 1

    def _take(self) -> list[_Job]:
        batch: list[_Job] = []
        written: set[str] = set()
        clashing: list[_Job] = []
        while self._queue and max(len(batch), len(clashing)) < self._width:
            job = self._queue.popleft()
            if written.isdisjoint(job.writes):
                written.update(job.writes)
                batch.append(job)
            else:
                clashing.append(job)
        self._queue.extendleft(reversed(clashing))
        return batch

    async def _commit(self, batch: list[_Job]) -> None:
        leases = {job.lease for job in batch}
        try:
            result = await self._store.txn(Txn(success=tuple(job.txn for job in batch)))
        except NotFound as error:
            if len(leases) == 1:
                _fail(batch, error)
                return
        except TesseraError as error:
            _fail(batch, error)
            return
        else:
            for job, inner in zip(batch, result.results, strict=True):
                assert isinstance(inner, TxnResult)
                job.call.settle(job.at, inner)
            return
        for lease in leases:
            await self._commit([job for job in batch if job.lease == lease])


def _fail(batch: Iterable[_Job], error: TesseraError) -> None:
    for job in batch:
        job.call.settle(job.at, error)


def _written(txn: Txn) -> Iterator[str]:
    for op in (*txn.success, *txn.failure):
        if isinstance(op, Txn):
            yield from _written(op)
        elif isinstance(op, Put | Delete):
            yield op.key
