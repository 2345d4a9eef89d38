"""The cluster as policyd sees it at one revision; batches of watch events in, change-sets out.

    events --sorted by prefix--+--> identities that came ---+
                               +--> policies ---------------+--> Resolver --> groups, policies
                               +--> identities that went ---+        |
                               +--> addresses, nodes --> Addresses <-+ known identities, prefixes
                                                             +--> Resolver: who has which address

Pure but for the log. What cannot be read changes nothing: the last good value stays in force.
An address is shown once its identity is known, and no longer: within one change-set the address
leaves as the identity does, whatever the order of their keys' events.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from identity.keys import ID_PREFIX, IP_PREFIX, NODES_PREFIX
from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.policy.clauses import PolicyRef
from services.policy.resolve import Changes, Resolver
from services.policyd import published, records
from services.policyd.addresses import Addresses
from services.policyd.change import ChangeSet, Gathering
from services.policyd.records import (
    NEXT_RULE_KEY,
    OBJECT_PREFIX,
    Broken,
    Held,
    JustParsed,
    Old,
    Stored,
)
from services.runtime.errors import Invalid
from services.runtime.log import logger
from services.runtime.tracing import current_traceparent, span
from services.store.model import Changed, KeyValue, Removed, Revision, Synced, WatchEvent

log = logger(__name__)

PREFIXES = (OBJECT_PREFIX, NEXT_RULE_KEY, ID_PREFIX, IP_PREFIX, NODES_PREFIX)


@dataclass(slots=True)
class _Batch:
    """Events by prefix; None: the key is gone."""

    policies: dict[str, KeyValue | None] = field(default_factory=dict)
    identities: dict[str, KeyValue | None] = field(default_factory=dict)
    addresses: dict[str, KeyValue | None] = field(default_factory=dict)
    nodes: dict[str, KeyValue | None] = field(default_factory=dict)
    counter: dict[str, KeyValue | None] = field(default_factory=dict)
    revision: int = 0

    def add(self, event: WatchEvent) -> None:
        match event:
            case Changed(kv=kv):
                self._put(kv.key, kv)
                self.revision = max(self.revision, kv.mod_revision)
            case Removed(key=key, revision=revision):
                self._put(key, None)
                self.revision = max(self.revision, revision)
            case Synced(revision=revision):
                self.revision = max(self.revision, revision)

    def _put(self, key: str, kv: KeyValue | None) -> None:
        if key.startswith(OBJECT_PREFIX):
            self.policies[key] = kv
        elif key.startswith(ID_PREFIX):
            self.identities[key] = kv
        elif key.startswith(IP_PREFIX):
            self.addresses[key] = kv
        elif key == NEXT_RULE_KEY:
            self.counter[key] = kv
        else:
            self.nodes[key] = kv


@dataclass(frozen=True, slots=True)
class News:
    """A line of the log, written once the change is on its way: a line takes 0.2 ms of a process
    that was asleep, and every node would wait for it."""

    revision: Revision
    ref: PolicyRef
    traceparent: str = ""
    removed: bool = False


class State:
    def __init__(self, resolver: Resolver) -> None:
        self.resolver = resolver
        self.revision = Revision(0)
        self.addresses = Addresses(resolver.knows)
        self.policies: dict[PolicyRef, Stored] = {}
        self.broken: dict[PolicyRef, Broken] = {}
        self.groups = 0
        self.synced = False
        self.just_parsed = JustParsed()
        self._counter: KeyValue | None = None
        self._news: list[News] = []
        self._identities: set[NumericIdentity] = set()

    @property
    def identities(self) -> int:
        """Those of the cluster, without the reserved ones."""
        return len(self._identities)

    def tell(self) -> None:
        """Logs what the last changes did to policies."""
        for news in self._news:
            # W3C trace context: version-trace_id-parent_id-flags.
            trace = {"trace_id": news.traceparent.split("-")[1]} if news.traceparent else {}
            about = log.bind(policy=str(news.ref), revision=news.revision, **trace)
            if news.removed:
                about.info("policy.removed")
            else:
                about.info("policy.set")
        self._news.clear()

    def held(self, refs: Iterable[PolicyRef]) -> Held:
        """As of `revision`."""
        found = ((ref, self._old(ref)) for ref in refs)
        return Held({ref: old for ref, old in found if old is not None}, self._counter)

    def _old(self, ref: PolicyRef) -> Old | None:
        broken, good = self.broken.get(ref), self.policies.get(ref)
        if broken is not None:
            return Old(broken.revision, None, 0)
        if good is None:
            return None
        return Old(good.revision, good.record.manifest, good.record.rule_count)

    def apply(self, events: Sequence[WatchEvent]) -> ChangeSet:
        """Raises `Invalid` when the revisions go back: this is another store, or an older one."""
        batch = _Batch()
        for event in events:
            batch.add(event)
        # A listing comes in the order of its keys; only what follows it comes in the store's.
        if self.synced and batch.revision < self.revision:
            raise Invalid(
                f"the store went from revision {self.revision} back to {batch.revision}: it was"
                " replaced or restored; starting over from what it holds now"
            )
        self.revision = max(self.revision, Revision(batch.revision))
        self._counter = batch.counter.get(NEXT_RULE_KEY, self._counter)
        gathering = Gathering(self.revision)
        self._identities_came(batch.identities, gathering)
        self._policies(batch.policies, gathering)
        self._announcements(batch.addresses)
        self._nodes(batch.nodes)
        self._identities_went(batch.identities, gathering)
        settled = self.addresses.settle()
        gathering.addresses |= settled.different
        self._resolved(self.resolver.move_addresses(settled.came, settled.went), gathering)
        self.synced = self.synced or any(isinstance(event, Synced) for event in events)
        return gathering.close()

    # ------------------------------------------------------------------ identities

    def _identities_came(self, events: Mapping[str, KeyValue | None], gathering: Gathering) -> None:
        came: dict[NumericIdentity, Labels] = {}
        for key, kv in _puts(events):
            with _reading(key):
                came[published.identity_of(key)] = published.labels_of(kv.value)
        if came:
            self._resolved(self.resolver.set_identities(came), gathering)
            self._identities |= came.keys()
            self.addresses.identities_changed(came)

    def _identities_went(self, events: Mapping[str, KeyValue | None], gathering: Gathering) -> None:
        gone: list[NumericIdentity] = []
        for key in _removals(events):
            with _reading(key):
                gone.append(published.identity_of(key))
        if gone:
            self._resolved(self.resolver.remove_identities(gone), gathering)
            self._identities.difference_update(gone)
            self.addresses.identities_changed(gone)
            gathering.locals.update(gone)

    # ------------------------------------------------------------------ policies

    def _policies(self, events: Mapping[str, KeyValue | None], gathering: Gathering) -> None:
        for key, kv in events.items():
            ref = records.ref_of(key)
            if ref is None:
                log.warning("policy.key_unknown", name=key)
            elif kv is None:
                self._remove_policy(ref, gathering)
            else:
                self._set_policy(records.read(ref, kv, self.just_parsed), gathering)

    def _set_policy(self, found: Stored | Broken, gathering: Gathering) -> None:
        ref = found.ref
        if isinstance(found, Broken):
            self.broken[ref] = found
            log.error("policy.broken", policy=str(ref), reason=found.reason)
            return
        with self._trace(found):
            gathering.traceparent = current_traceparent() if self.synced else ""
            self._resolved(self.resolver.set_policy(found.policy, found.rule_base), gathering)
        self.broken.pop(ref, None)
        self.policies[ref] = found
        if self.synced:
            self._news.append(News(found.revision, ref, gathering.traceparent))

    def _trace(self, found: Stored) -> AbstractContextManager[object]:
        if not self.synced:
            return nullcontext()  # the listing: what was applied long ago is not traced again
        parent = found.record.traceparent or None
        return span("policyd.resolve", parent, policy=str(found.ref))

    def _remove_policy(self, ref: PolicyRef, gathering: Gathering) -> None:
        self._resolved(self.resolver.remove_policy(ref), gathering)
        self.broken.pop(ref, None)
        if self.policies.pop(ref, None) is not None:
            self._news.append(News(self.revision, ref, removed=True))

    def _resolved(self, changes: Changes, gathering: Gathering) -> None:
        gathering.resolved(changes)
        self.groups += len(changes.groups_added) - len(changes.groups_removed)
        self.addresses.remove_prefixes(changes.prefixes_removed)
        self.addresses.set_prefixes(changes.prefixes_added)

    # ------------------------------------------------------------------ addresses and nodes

    def _announcements(self, events: Mapping[str, KeyValue | None]) -> None:
        for key in _removals(events):
            with _reading(key):
                self.addresses.withdraw(published.ip_of(key))
        for key, kv in _puts(events):
            with _reading(key):
                self.addresses.announce(published.ip_of(key), published.announcement_of(kv.value))

    def _nodes(self, events: Mapping[str, KeyValue | None]) -> None:
        for key in _removals(events):
            with _reading(key):
                self.addresses.remove_node(published.node_of(key))
        for key, kv in _puts(events):
            with _reading(key):
                self.addresses.set_node(published.node_of(key), published.node_ips_of(kv.value))


def _puts(events: Mapping[str, KeyValue | None]) -> Iterator[tuple[str, KeyValue]]:
    return ((key, kv) for key, kv in events.items() if kv is not None)


def _removals(events: Mapping[str, KeyValue | None]) -> Iterator[str]:
    return (key for key, kv in events.items() if kv is None)


@contextmanager
def _reading(key: str) -> Iterator[None]:
    """What cannot be read is logged and passed over."""
    try:
        yield
    except Invalid as error:
        log.warning("store.value_broken", name=key, reason=str(error))
