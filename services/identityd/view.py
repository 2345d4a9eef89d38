"""What the store holds about identities, followed by watch.

    id/<N>   ──► labels, postings            ┐
    idx/     ──► number of a label set       ├─ free numbers, idle numbers
    ref/     ──► nodes that use a number     │
    tomb/    ──► numbers in quarantine       ┘

Knowledge may lag behind the store; whoever writes compares. What a transaction of this process
learned is entered at once, and an older event does not undo it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from identity import keys
from identity.allocate import FreeNumbers, Wanted
from identity.index import Postings
from identity.labels import Invalid, Labels
from identity.numbers import NumericIdentity, reserved_labels
from identity.selector import Selector
from services.identityd.txns import Collectable
from services.runtime.clock import Clock
from services.runtime.errors import Retry
from services.runtime.log import logger
from services.store.model import Changed, KeyValue, Removed, Revision, Store, Synced, WatchEvent

log = logger(__name__)

PREFIXES: Final = (keys.ID_PREFIX, keys.IDX_PREFIX, keys.REF_PREFIX, keys.TOMB_PREFIX)
# Less than the deadline of an agent's call, so that the agent learns why it waits.
SYNC_WAIT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class _Entry:
    number: NumericIdentity
    revision: Revision


@dataclass(frozen=True, slots=True)
class _Known:
    labels: Labels
    digest: str
    revision: Revision


class IdentityView:
    def __init__(
        self,
        store: Store,
        free: FreeNumbers,
        clock: Clock,
        *,
        sync_wait_s: float = SYNC_WAIT_S,
    ) -> None:
        self._store = store
        self._clock = clock
        self._sync_wait_s = sync_wait_s
        self.free = free
        self._synced = asyncio.Event()
        self._idle_news = asyncio.Event()
        self._clear()

    def _clear(self) -> None:
        self._known: dict[NumericIdentity, _Known] = {}
        self._index: dict[str, _Entry] = {}
        self._nodes: dict[NumericIdentity, set[str]] = {}
        # Created by this process; the watch is yet to tell.
        self._own: dict[NumericIdentity, Wanted] = {}
        self._tombs: dict[NumericIdentity, str] = {}
        # Number -> since when (monotonic) it has no reference; oldest first.
        self._idle: dict[NumericIdentity, float] = {}
        self._postings = Postings()
        self._postings.add(reserved_labels())
        self._references = 0
        self._released = 0
        self.free.reset()

    # -------------------------------------------------------------- following

    async def follow(self) -> None:
        """Until cancelled. Starts from nothing each time it is called."""
        self._synced.clear()
        self._clear()
        async for events in self._store.watch(*PREFIXES):
            self._apply(events)

    async def ready(self) -> None:
        """Returns once the first listing was read; raises `Retry` when that takes long."""
        if self._synced.is_set():
            return
        try:
            async with asyncio.timeout(self._sync_wait_s):
                await self._synced.wait()
        except TimeoutError:
            raise Retry(
                "identityd has not read the identities from the store yet; try again in a moment"
            ) from None

    @property
    def is_synced(self) -> bool:
        return self._synced.is_set()

    # -------------------------------------------------------------- asking

    def number_of(self, digest: str) -> NumericIdentity | None:
        entry = self._index.get(digest)
        return None if entry is None else entry.number

    def labels_of(self, number: NumericIdentity) -> Labels | None:
        reserved = reserved_labels().get(number)
        if reserved is not None:
            return reserved
        known = self._known.get(number)
        return None if known is None else known.labels

    def nodes_of(self, number: NumericIdentity) -> list[str]:
        return sorted(self._nodes.get(number, ()))

    def quarantined(self, number: NumericIdentity) -> str | None:
        """Digest of the label set that had the number."""
        return self._tombs.get(number)

    def chosen(self, selector: Selector, after: int, limit: int) -> list[NumericIdentity]:
        """Ascending, greater than `after`, at most `limit`; reserved identities included."""
        members = self._postings.evaluate(selector)
        page: list[NumericIdentity] = []
        for number in members.iter_equal_or_larger(after + 1):
            if len(page) == limit:
                break
            page.append(NumericIdentity(number))
        return page

    @property
    def in_use(self) -> int:
        return len(self._known)

    @property
    def in_quarantine(self) -> int:
        return len(self._tombs)

    @property
    def references(self) -> int:
        return self._references

    @property
    def released(self) -> int:
        """References that went away since the view was built."""
        return self._released

    # -------------------------------------------------------------- collecting

    def idle_since(self) -> Mapping[NumericIdentity, float]:
        """Numbers without a reference, longest first."""
        return self._idle

    def collectable(self, number: NumericIdentity) -> Collectable | None:
        """None for an identity that another writer made, without our index."""
        known = self._known.get(number)
        if known is None:
            return None
        entry = self._index.get(known.digest)
        if entry is None or entry.number != number:
            return None
        return Collectable(number, known.digest, entry.revision, known.revision)

    def postpone(self, number: NumericIdentity) -> None:
        """Counts the number's idle time from now."""
        if self._idle.pop(number, None) is not None:
            self._idle[number] = self._clock.monotonic_s()

    async def idle_news(self) -> None:
        """Waits until a number becomes idle."""
        self._idle_news.clear()
        await self._idle_news.wait()

    # -------------------------------------------------------------- learning

    def created(self, number: NumericIdentity, wanted: Wanted, revision: Revision) -> None:
        """A transaction of ours gave `number` to the set."""
        self._index[wanted.digest] = _Entry(number, revision)
        if number not in self._known:
            self._own[number] = wanted

    def corrected(self, digest: str, found: KeyValue | None) -> NumericIdentity | None:
        """What a transaction that failed read under the set's index key."""
        if found is None:
            self._index.pop(digest, None)
            return None
        self._index_changed(digest, found)
        return self.number_of(digest)

    def _apply(self, events: Iterable[WatchEvent]) -> None:
        fresh: dict[NumericIdentity, Labels] = {}
        for event in events:
            match event:
                case Changed(kv=kv):
                    self._changed(kv, fresh)
                case Removed():
                    self._removed(event, fresh)
                case Synced():
                    self._finish_listing()
        if fresh:
            self._postings.add(fresh)

    def _changed(self, kv: KeyValue, fresh: dict[NumericIdentity, Labels]) -> None:
        key = kv.key
        if key.startswith(keys.REF_PREFIX):
            self._reference_changed(key)
        elif key.startswith(keys.IDX_PREFIX):
            self._index_changed(key.removeprefix(keys.IDX_PREFIX), kv)
        elif (number := keys.number_in(key, keys.ID_PREFIX)) is not None:
            self._identity_changed(number, kv, fresh)
        elif (number := keys.number_in(key, keys.TOMB_PREFIX)) is not None:
            self._tombs[number] = kv.value.decode(errors="replace")
            self.free.occupy(number)

    def _identity_changed(
        self, number: NumericIdentity, kv: KeyValue, fresh: dict[NumericIdentity, Labels]
    ) -> None:
        self.free.occupy(number)
        learned = self._read(number, kv)
        known = self._known.get(number)
        if known is not None and known.labels != learned.labels:
            self._forget_postings(number, known.labels, fresh)
        if known is None or known.labels != learned.labels:
            fresh[number] = learned.labels
        self._known[number] = learned
        if number not in self._nodes:
            self._becomes_idle(number)

    def _read(self, number: NumericIdentity, kv: KeyValue) -> _Known:
        own = self._own.pop(number, None)
        if own is not None and own.labels.canonical().encode() == kv.value:
            return _Known(own.labels, own.digest, kv.mod_revision)
        try:
            labels = Labels.from_canonical(kv.value.decode())
        except (Invalid, UnicodeDecodeError) as error:
            # Occupied all the same: the number must not be given out.
            log.warning("identity.unreadable", identity=number, error=str(error))
            labels = Labels.EMPTY
        return _Known(labels, labels.digest(), kv.mod_revision)

    def _index_changed(self, digest: str, kv: KeyValue) -> None:
        entry = self._index.get(digest)
        number = keys.number_in(keys.ID_PREFIX + kv.value.decode(), keys.ID_PREFIX)
        if number is not None and (entry is None or kv.mod_revision >= entry.revision):
            self._index[digest] = _Entry(number, kv.mod_revision)

    def _reference_changed(self, key: str) -> None:
        reference = keys.ref_in(key)
        if reference is None:
            return
        number, node = reference
        nodes = self._nodes.setdefault(number, set())
        if node not in nodes:
            nodes.add(node)
            self._references += 1
        self._idle.pop(number, None)

    def _removed(self, event: Removed, fresh: dict[NumericIdentity, Labels]) -> None:
        key = event.key
        if key.startswith(keys.REF_PREFIX):
            self._reference_removed(key)
        elif key.startswith(keys.IDX_PREFIX):
            digest = key.removeprefix(keys.IDX_PREFIX)
            entry = self._index.get(digest)
            if entry is not None and entry.revision < event.revision:
                del self._index[digest]
        elif (number := keys.number_in(key, keys.ID_PREFIX)) is not None:
            known = self._known.pop(number, None)
            if known is not None:
                self._forget_postings(number, known.labels, fresh)
            self._idle.pop(number, None)
            if number not in self._tombs:
                self.free.vacate(number)
        elif (number := keys.number_in(key, keys.TOMB_PREFIX)) is not None:
            self._tombs.pop(number, None)
            if number not in self._known:
                self.free.vacate(number)

    def _forget_postings(
        self, number: NumericIdentity, labels: Labels, fresh: dict[NumericIdentity, Labels]
    ) -> None:
        if fresh.pop(number, None) is None:
            self._postings.remove(number, labels)

    def _reference_removed(self, key: str) -> None:
        reference = keys.ref_in(key)
        if reference is None:
            return
        number, node = reference
        nodes = self._nodes.get(number)
        if nodes is None or node not in nodes:
            return
        nodes.discard(node)
        self._references -= 1
        self._released += 1
        if not nodes:
            del self._nodes[number]
            self._becomes_idle(number)

    def _becomes_idle(self, number: NumericIdentity) -> None:
        if self._synced.is_set() and number in self._known and number not in self._idle:
            self._idle[number] = self._clock.monotonic_s()
            self._idle_news.set()

    def _finish_listing(self) -> None:
        now_s = self._clock.monotonic_s()
        self._idle = {number: now_s for number in self._known if number not in self._nodes}
        self._synced.set()
        self._idle_news.set()
        log.info("identity.synced", count=len(self._known))
