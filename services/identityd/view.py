"""What the store holds about identities, followed by watch.

    id/<N>     ──► labels, postings, usage      ┐
    idx/       ──► number of a label set        ├─ free numbers, idle numbers ──► feed of changes
    ref/       ──► nodes that use a number      │
    tomb/      ──► numbers in quarantine        ┘
    ip, nodes  ──► announced addresses            heartbeat ──► when the watch was last alive

Knowledge may lag behind the store; whoever writes compares. What a transaction of this process
learned is entered at once, and an older event does not undo it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from pyroaring import BitMap

from identity import keys
from identity.allocate import Buried, FreeNumbers, Wanted
from identity.index import Postings
from identity.labels import Invalid, Labels
from identity.numbers import NumericIdentity
from identity.selector import Selector
from services.identityd.announced import Announced
from services.identityd.caution import Losses
from services.identityd.feed import Change, ChangeKind, Feed
from services.identityd.quarantine import Quarantine, Tomb
from services.identityd.txns import Collectable
from services.identityd.usage import Usage, namespace_of
from services.runtime.clock import Clock
from services.runtime.errors import Retry
from services.runtime.log import logger
from services.store.model import Changed, KeyValue, Removed, Revision, Store, Synced, WatchEvent

log = logger(__name__)

PREFIXES: Final = (
    keys.ID_PREFIX,
    keys.IDX_PREFIX,
    keys.REF_PREFIX,
    keys.TOMB_PREFIX,
    keys.HEARTBEAT,
    keys.IP_PREFIX,
    keys.NODES_PREFIX,
)
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
        standing: Mapping[NumericIdentity, Labels],
        pressed_quarantine_s: float,
        sync_wait_s: float = SYNC_WAIT_S,
    ) -> None:
        self._store = store
        self._clock = clock
        self._sync_wait_s = sync_wait_s
        self.free = free
        # Of identities that are never stored.
        self._standing = standing
        self.quarantine = Quarantine(pressed_quarantine_s)
        self.losses = Losses()
        self.feed = Feed()
        self._synced = asyncio.Event()
        self._idle_news = asyncio.Event()
        self._clear()

    def _clear(self) -> None:
        self._known: dict[NumericIdentity, _Known] = {}
        self._index: dict[str, _Entry] = {}
        self._nodes: dict[NumericIdentity, set[str]] = {}
        # Being created by this process, so that the watch's news need not be parsed.
        self._own: dict[NumericIdentity, Wanted] = {}
        self._under_way: Counter[str] = Counter()
        self.quarantine.clear()
        self.announced = Announced()
        self.usage = Usage()
        self.losses.clear()
        self.heard_s = self._clock.monotonic_s()
        self.revision = Revision(0)
        # Number -> since when (monotonic) it has no reference; oldest first.
        self._idle: dict[NumericIdentity, float] = {}
        self._postings = Postings()
        self._postings.add(self._standing)
        self._references = 0
        # Of the batch being read: nodes, and how many references of each went.
        self._gone: Counter[str] = Counter()
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

    async def until_synced(self) -> None:
        """However long that takes."""
        await self._synced.wait()

    @property
    def is_synced(self) -> bool:
        return self._synced.is_set()

    # -------------------------------------------------------------- asking

    def number_of(self, digest: str) -> NumericIdentity | None:
        entry = self._index.get(digest)
        return None if entry is None else entry.number

    def labels_of(self, number: NumericIdentity) -> Labels | None:
        standing = self._standing.get(number)
        if standing is not None:
            return standing
        known = self._known.get(number)
        return None if known is None else known.labels

    def nodes_of(self, number: NumericIdentity) -> list[str]:
        return sorted(self._nodes.get(number, ()))

    def idx_revision(self, digest: str) -> Revision:
        """Since when the set has its number; 0 when that is not known."""
        entry = self._index.get(digest)
        return Revision(0) if entry is None else entry.revision

    def find(self, number: NumericIdentity) -> Buried | None:
        tomb = self.quarantine.of(number)
        return None if tomb is None else Buried(number, tomb.digest, tomb.revision)

    def take_over(self) -> Buried | None:
        found = self.quarantine.take_oldest(self._clock.monotonic_s())
        if found is None:
            return None
        number, tomb = found
        return Buried(number, tomb.digest, tomb.revision)

    def members(self, selector: Selector) -> BitMap:
        """The identities that `selector` chooses, standing ones included; the caller's own."""
        return self._postings.evaluate(selector)

    @property
    def in_use(self) -> int:
        return len(self._known)

    @property
    def in_quarantine(self) -> int:
        return len(self.quarantine)

    @property
    def references(self) -> int:
        return self._references

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

    def under_way(self, namespace: str) -> int:
        """Identities of the namespace that this process is creating, unseen by the watch."""
        return self._under_way[namespace]

    def expecting(self, number: NumericIdentity, wanted: Wanted) -> None:
        """A transaction of ours is about to give `number` to the set."""
        self._own[number] = wanted
        self._under_way[namespace_of(wanted.labels)] += 1

    def created(self, number: NumericIdentity, wanted: Wanted, revision: Revision) -> None:
        """It did. The watch may have told before."""
        if number not in self._known:
            self._index[wanted.digest] = _Entry(number, revision)

    def not_created(self, number: NumericIdentity) -> None:
        self._take_own(number)

    def _take_own(self, number: NumericIdentity) -> Wanted | None:
        own = self._own.pop(number, None)
        if own is not None:
            self._under_way[namespace_of(own.labels)] -= 1
        return own

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
                    self.revision = max(self.revision, kv.mod_revision)
                    self._changed(kv, fresh)
                case Removed():
                    self.revision = max(self.revision, event.revision)
                    self._removed(event, fresh)
                case Synced(revision=revision):
                    self.revision = max(self.revision, revision)
                    self._finish_listing()
        if fresh:
            self._postings.add(fresh)
        self._note_losses()
        self.feed.flush()

    def _note_losses(self) -> None:
        """A reference is lost when its node went with it: both hung on the session's lease. A node
        that is there has given it back, which happens all the time."""
        lost = sum(n for node, n in self._gone.items() if not self.announced.has_node(node))
        self._gone.clear()
        if lost:
            self.losses.add(lost, self._clock.monotonic_s())

    def _changed(self, kv: KeyValue, fresh: dict[NumericIdentity, Labels]) -> None:
        key = kv.key
        if key.startswith(keys.REF_PREFIX):
            self._reference_changed(kv)
        elif key.startswith(keys.IDX_PREFIX):
            self._index_changed(key.removeprefix(keys.IDX_PREFIX), kv)
        elif (number := keys.number_in(key, keys.ID_PREFIX)) is not None:
            self._identity_changed(number, kv, fresh)
        elif (number := keys.number_in(key, keys.TOMB_PREFIX)) is not None:
            digest, now_s = kv.value.decode(errors="replace"), self._clock.monotonic_s()
            self.quarantine.put(number, Tomb(digest, kv.mod_revision, now_s))
            self.free.occupy(number)
        elif key == keys.HEARTBEAT:
            self.heard_s = self._clock.monotonic_s()
        elif key.startswith((keys.IP_PREFIX, keys.NODES_PREFIX)):
            self.announced.put(key, kv.value)

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
            self.usage.add(learned.labels)
            self._tell(kv.mod_revision, ChangeKind.CREATED, number, learned.labels)
        self._known[number] = learned
        if number not in self._nodes:
            self._becomes_idle(number)

    def _read(self, number: NumericIdentity, kv: KeyValue) -> _Known:
        own = self._take_own(number)
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

    def _reference_changed(self, kv: KeyValue) -> None:
        reference = keys.ref_in(kv.key)
        if reference is None:
            return
        number, node = reference
        nodes = self._nodes.setdefault(number, set())
        if node not in nodes:
            nodes.add(node)
            self._references += 1
            self._tell_reference(kv.mod_revision, ChangeKind.REFERENCED, number, node)
        self._idle.pop(number, None)

    def _removed(self, event: Removed, fresh: dict[NumericIdentity, Labels]) -> None:
        key = event.key
        if key.startswith(keys.REF_PREFIX):
            self._reference_removed(event)
        elif key.startswith(keys.IDX_PREFIX):
            digest = key.removeprefix(keys.IDX_PREFIX)
            entry = self._index.get(digest)
            if entry is not None and entry.revision < event.revision:
                del self._index[digest]
        elif (number := keys.number_in(key, keys.ID_PREFIX)) is not None:
            known = self._known.pop(number, None)
            if known is not None:
                self._forget_postings(number, known.labels, fresh)
                self._tell(event.revision, ChangeKind.DELETED, number, known.labels)
            self._idle.pop(number, None)
            if number not in self.quarantine:
                self.free.vacate(number)
        elif (number := keys.number_in(key, keys.TOMB_PREFIX)) is not None:
            self.quarantine.drop(number)
            if number not in self._known:
                self.free.vacate(number)
        elif key.startswith((keys.IP_PREFIX, keys.NODES_PREFIX)):
            self.announced.drop(key)

    def _forget_postings(
        self, number: NumericIdentity, labels: Labels, fresh: dict[NumericIdentity, Labels]
    ) -> None:
        self.usage.remove(labels)
        if fresh.pop(number, None) is None:
            self._postings.remove(number, labels)

    def _reference_removed(self, event: Removed) -> None:
        reference = keys.ref_in(event.key)
        if reference is None:
            return
        number, node = reference
        nodes = self._nodes.get(number)
        if nodes is None or node not in nodes:
            return
        nodes.discard(node)
        self._references -= 1
        self._gone[node] += 1
        self._tell_reference(event.revision, ChangeKind.RELEASED, number, node)
        if not nodes:
            del self._nodes[number]
            self._becomes_idle(number)

    def _tell_reference(
        self, revision: Revision, kind: ChangeKind, number: NumericIdentity, node: str
    ) -> None:
        known = self._known.get(number)
        self._tell(revision, kind, number, Labels.EMPTY if known is None else known.labels, node)

    def _tell(
        self,
        revision: Revision,
        kind: ChangeKind,
        number: NumericIdentity,
        labels: Labels,
        node: str = "",
    ) -> None:
        if self._synced.is_set():
            self.feed.add(Change(revision, kind, number, labels, node))

    def _becomes_idle(self, number: NumericIdentity) -> None:
        if self._synced.is_set() and number in self._known and number not in self._idle:
            self._idle[number] = self._clock.monotonic_s()
            self._idle_news.set()

    def _finish_listing(self) -> None:
        now_s = self._clock.monotonic_s()
        self._idle = {number: now_s for number in self._known if number not in self._nodes}
        self.feed.begin(self.revision)
        self._synced.set()
        self._idle_news.set()
        log.info("identity.synced", count=len(self._known))
