"""Which labels make an identity, as every replica and every node agree on it.

    configuration ──► defaults ┐
    tessera/id/rules ──────────┴─► LabelRules ──┐
    policies ──► keys they select by ───────────┴─► RulesInForce ──► allocator
                                                         └─► nodes: "the rules are now <version>"

A node that hears of another version asks anew for the numbers of its endpoints, and moves those
whose number is another one now. Replicas may differ for the moment in which a change spreads; each
answers by the rules it knows, and the node asks again when that replica has heard of the change.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from identity import keys
from identity import labels as label_sets
from identity.labels import CLUSTER_KEY, NAMESPACE_KEY, RESERVED, Label, LabelFilter, Labels
from services.policy.parse import parse
from services.policy.relevance import keys_of
from services.runtime.errors import Conflict, Invalid, Retry
from services.runtime.log import logger
from services.store.model import Changed, KeyValue, Put, Removed, Revision, Store, Synced, Txn
from services.store.txn import mod_is

log = logger(__name__)

POLICIES_PREFIX: Final = "tessera/policy/object/"
# Less than the deadline of an agent's call, so that the agent learns why it waits.
SYNC_WAIT_S: Final = 2.0

# Kept whatever policies select: namespaced policies select by the one, a mesh reads the other.
_ALWAYS_RELEVANT: Final = frozenset({NAMESPACE_KEY, CLUSTER_KEY})


class LabelRules(Struct, frozen=True, forbid_unknown_fields=True):
    """`label_filter`: added to the default, "!k8s:uid" ignores, "k8s:app" allows (and only what is
    allowed counts then). `namespace_quota`: identities of one namespace, 0 for no limit.
    `warn_values`: so many values of one key within a namespace are told."""

    label_filter: tuple[str, ...] = ()
    policy_relevant: bool = False
    namespace_quota: Annotated[int, Meta(ge=0)] = 4096
    warn_values: Annotated[int, Meta(ge=2)] = 100


class _Record(Struct, frozen=True):
    """What is read of a stored policy."""

    manifest: str


class RulesInForce:
    def __init__(self, defaults: LabelRules) -> None:
        """Raises `Invalid` for a filter that cannot be read."""
        self._defaults = defaults
        self._policies: dict[str, frozenset[str]] = {}
        self._selected: Counter[str] = Counter()
        self._synced = asyncio.Event()
        self._changed = asyncio.Event()
        self.revision = Revision(0)
        self._adopt(defaults)
        self.version = self._version()

    # -------------------------------------------------------------- asking

    @property
    def relevant(self) -> frozenset[str] | None:
        """Keys that count; None when all do."""
        if not self.rules.policy_relevant:
            return None
        return _ALWAYS_RELEVANT | self._selected.keys()

    def apply(self, labels: Labels) -> Labels:
        kept = self._filter.apply(labels)
        if not self.rules.policy_relevant:
            return kept
        return kept.keep(self._is_relevant)

    async def ready(self) -> None:
        """Raises `Retry` when the first reading takes long."""
        if self._synced.is_set():
            return
        try:
            async with asyncio.timeout(SYNC_WAIT_S):
                await self._synced.wait()
        except TimeoutError:
            raise Retry(
                "identityd has not read the label rules from the store yet; try again in a moment"
            ) from None

    async def news(self, version: str) -> str:
        """The version in force, once it is another than `version`."""
        await self._synced.wait()
        while self.version == version:
            await self._changed.wait()
        return self.version

    async def reached(self, revision: Revision) -> None:
        """Returns when rules of `revision` or later were seen. Raises `Retry` when that takes
        long."""
        try:
            async with asyncio.timeout(SYNC_WAIT_S):
                while self.revision < revision:
                    await self._changed.wait()
        except TimeoutError:
            raise Retry("the label rules are set, but identityd has not seen them yet") from None

    # -------------------------------------------------------------- following

    async def follow(self, store: Store) -> None:
        """Until cancelled. Starts from nothing each time it is called."""
        self._policies.clear()
        self._selected.clear()
        async for events in store.watch(keys.RULES, POLICIES_PREFIX):
            for event in events:
                match event:
                    case Changed(kv=kv):
                        self._set(kv.key, kv)
                    case Removed(key=key):
                        self._set(key, None)
                    case Synced():
                        self._synced.set()
            self._wake()

    def _set(self, key: str, kv: KeyValue | None) -> None:
        if key == keys.RULES:
            self._set_rules(kv)
        elif key.startswith(POLICIES_PREFIX):
            self._selected.subtract(self._policies.pop(key, ()))
            if kv is not None:
                selected = self._policies[key] = _selected_by(key, kv.value)
                self._selected.update(selected)
            self._selected = +self._selected

    def _set_rules(self, kv: KeyValue | None) -> None:
        self.revision = Revision(0) if kv is None else kv.mod_revision
        if kv is None:
            self._adopt(self._defaults)
            return
        try:
            self._adopt(decode(kv.value))
        except Invalid as error:
            log.warning("rules.broken", name=keys.RULES, reason=str(error))

    def _adopt(self, rules: LabelRules) -> None:
        self._filter = _filter_of(rules)
        self.rules = rules

    def _wake(self) -> None:
        version = self._version()
        if version != self.version:
            self.version = version
            log.info("rules.in_force", revision=self.revision, version=version)
        self._changed.set()
        self._changed = asyncio.Event()

    def _version(self) -> str:
        relevant = self.relevant
        parts = [*self.rules.label_filter, "", *sorted(relevant or ())]
        text = "\n".join(parts) + ("\nall" if relevant is None else "")
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _is_relevant(self, label: Label) -> bool:
        relevant = self._selected.get(label.key, 0) > 0 or label.key in _ALWAYS_RELEVANT
        return relevant or label.source == RESERVED


async def set_rules(store: Store, rules: LabelRules, expected: Revision) -> Revision:
    """`expected`: the revision read before, 0 while the configuration's are in force. Raises
    `Invalid`, and `Conflict` when somebody else was faster."""
    _filter_of(rules)
    put = Put(keys.RULES, msgspec.json.encode(rules))
    result = await store.txn(Txn(compares=(mod_is(keys.RULES, expected),), success=(put,)))
    if not result.succeeded:
        raise Conflict(
            f"the label rules have changed since revision {expected}; read them and try again"
        )
    return result.revision


def decode(value: bytes) -> LabelRules:
    """Raises `Invalid`."""
    try:
        return msgspec.json.decode(value, type=LabelRules)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"label rules: {error}") from None


def _filter_of(rules: LabelRules) -> LabelFilter:
    try:
        return LabelFilter.configured(rules.label_filter)
    except label_sets.Invalid as error:
        raise Invalid(str(error)) from None


def _selected_by(key: str, value: bytes) -> frozenset[str]:
    """None of a policy that cannot be read: it selects nobody, as policyd reports."""
    try:
        manifest = msgspec.json.decode(value, type=_Record).manifest
    except (msgspec.DecodeError, UnicodeDecodeError):
        return frozenset()
    namespace = key.removeprefix(POLICIES_PREFIX).split("/")[1]
    found = parse(manifest.encode(), key, namespace).policies
    return frozenset().union(*(keys_of(one.policy) for one in found))
