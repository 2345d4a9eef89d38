"""Policies as the store keeps them: keys, the JSON record, and reading either back.

    tessera/policy/object/<kind>/<namespace, or _ for none>/<name>   a PolicyRecord
    tessera/policy/next_rule                                         decimal
    tessera/policy/instance                                          32 hex digits, written once

Every write of a policy also writes next_rule, guarded by its revision: writers of policies take
turns there, and a rule id is never given twice. A record that cannot be read is a value too.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import msgspec

from services.policy.clauses import FIRST_CLAUSE_RULE, PolicyRef, RuleId
from services.policy.model import Policy
from services.policy.parse import Parsed, ParsedPolicy, parse
from services.policy.resolve import rule_count
from services.runtime.errors import Invalid
from services.store.model import KeyValue, Put, Range, RangeResult, Revision, Store, Txn
from services.store.txn import absent

OBJECT_PREFIX: Final = "tessera/policy/object/"
NEXT_RULE_KEY: Final = "tessera/policy/next_rule"
INSTANCE_KEY: Final = "tessera/policy/instance"

_NO_NAMESPACE: Final = "_"


class PolicyRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`manifest`: the document as it was applied. `traceparent`: of the request that applied it."""

    manifest: str
    rule_base: int
    rule_count: int
    author: str = ""
    applied_at: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """One policy at one revision."""

    ref: PolicyRef
    revision: Revision
    record: PolicyRecord
    policy: Policy

    @property
    def rule_base(self) -> RuleId:
        return RuleId(self.record.rule_base)

    @property
    def revision_and_manifest(self) -> tuple[Revision, str]:
        return self.revision, self.record.manifest


@dataclass(frozen=True, slots=True)
class Broken:
    """What stands under a policy's key and is none; `manifest` as far as it can be read."""

    ref: PolicyRef
    revision: Revision
    reason: str
    manifest: str = ""

    @property
    def revision_and_manifest(self) -> tuple[Revision, str]:
        return self.revision, self.manifest


@dataclass(frozen=True, slots=True)
class Old:
    """What a policy's key held. `manifest` None: nothing that can be read."""

    revision: Revision
    manifest: str | None
    rule_count: int


@dataclass(frozen=True, slots=True)
class Held:
    """What the store held, at one revision, of what a request names, and the counter that guards
    it. The counter's value is not looked at before it is used."""

    policies: Mapping[PolicyRef, Old]
    counter: KeyValue | None


class JustParsed:
    """Policies by their stored text, while a request of this process writes them: so the watch's
    side does not parse them again."""

    def __init__(self) -> None:
        self._policies: dict[tuple[PolicyRef, str], Policy] = {}

    @contextmanager
    def remembering(self, policies: Iterable[ParsedPolicy]) -> Iterator[None]:
        """Each parsed from its own text alone: positions count from the start of what was parsed,
        and every replica must tell the same line of the stored manifest."""
        mine = {(one.policy.ref, one.manifest_text): one.policy for one in policies}
        self._policies |= mine
        try:
            yield
        finally:
            for key in mine:
                self._policies.pop(key, None)

    def find(self, ref: PolicyRef, manifest: str) -> Policy | None:
        return self._policies.get((ref, manifest))


def whole(text: bytes, parsed: Parsed) -> list[ParsedPolicy]:
    """The policy that is all of `text`, or nothing."""
    match parsed.policies:
        case (one,) if one.manifest_text.encode() == text:
            return [one]
        case _:
            return []


def alone(parsed: Parsed, held: Held) -> list[ParsedPolicy]:
    """Those that differ from what is held, each parsed once more from its own text."""
    return [
        ParsedPolicy(found.policy, one.manifest_text)
        for one in parsed.policies
        if (old := held.policies.get(one.policy.ref)) is None or old.manifest != one.manifest_text
        for found in parse_stored(one.policy.ref, one.manifest_text).policies
    ]


async def instance_of(store: Store) -> str:
    """What tells this store's revisions from another's; made up by the first who asks."""
    mine = secrets.token_hex(16)
    make = Txn((absent(INSTANCE_KEY),), (Put(INSTANCE_KEY, mine.encode()),), (Range(INSTANCE_KEY),))
    match (await store.txn(make)).results:
        case (RangeResult(items=(kv,)),):
            return kv.value.decode(errors="replace")
        case _:
            return mine


def object_key(ref: PolicyRef) -> str:
    return OBJECT_PREFIX + path_of(ref)


def path_of(ref: PolicyRef) -> str:
    return f"{ref.kind}/{ref.namespace or _NO_NAMESPACE}/{ref.name}"


def ref_of(key: str) -> PolicyRef | None:
    """None: nobody who goes by `object_key` wrote this key."""
    return ref_of_path(key.removeprefix(OBJECT_PREFIX))


def ref_of_path(path: str) -> PolicyRef | None:
    parts = path.split("/")
    if len(parts) != 3 or not all(parts):
        return None
    kind, namespace, name = parts
    return PolicyRef(kind, "" if namespace == _NO_NAMESPACE else namespace, name)


def encode(record: PolicyRecord) -> bytes:
    return msgspec.json.encode(record)


def decode(value: bytes) -> PolicyRecord:
    """Raises `Invalid`."""
    try:
        return msgspec.json.decode(value, type=PolicyRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"its record in the store cannot be read: {error}") from error


def old(kv: KeyValue) -> Old:
    try:
        record = decode(kv.value)
    except Invalid:
        return Old(kv.mod_revision, None, 0)
    return Old(kv.mod_revision, record.manifest, record.rule_count)


def read(ref: PolicyRef, kv: KeyValue, parsed: JustParsed) -> Stored | Broken:
    try:
        record = decode(kv.value)
    except Invalid as error:
        return Broken(ref, kv.mod_revision, str(error))
    try:
        policy = _checked(parsed.find(ref, record.manifest) or _policy(ref, record), record)
    except Invalid as error:
        return Broken(ref, kv.mod_revision, str(error), record.manifest)
    return Stored(ref, kv.mod_revision, record, policy)


def next_rule(kv: KeyValue | None) -> RuleId:
    """Raises `Invalid` when the counter is no number: guessing could give a rule id twice."""
    if kv is None:
        return FIRST_CLAUSE_RULE
    text = kv.value.decode(errors="replace")
    if not (text.isascii() and text.isdecimal()) or int(text) < FIRST_CLAUSE_RULE:
        raise Invalid(
            f"{NEXT_RULE_KEY} holds {text!r} instead of a number from {FIRST_CLAUSE_RULE}; set it"
            " above rule_base + rule_count of every policy"
        )
    return RuleId(int(text))


def _policy(ref: PolicyRef, record: PolicyRecord) -> Policy:
    parsed = parse_stored(ref, record.manifest)
    errors = [problem for problem in parsed.problems if problem.severity == "error"]
    if errors:
        first = errors[0]
        raise Invalid(f"its manifest is refused at line {first.line}: {first.message}")
    if [found.policy.ref for found in parsed.policies] != [ref]:
        names = ", ".join(str(found.policy.ref) for found in parsed.policies) or "nothing"
        raise Invalid(f"its manifest describes {names}")
    return parsed.policies[0].policy


def _checked(policy: Policy, record: PolicyRecord) -> Policy:
    if rule_count(policy) != record.rule_count or record.rule_base < FIRST_CLAUSE_RULE:
        raise Invalid(
            f"its manifest has {rule_count(policy)} clauses where {record.rule_count} rule ids from"
            f" {record.rule_base} are set aside; apply it again"
        )
    return policy


def parse_stored(ref: PolicyRef, manifest: str) -> Parsed:
    return parse(manifest.encode(), str(ref), ref.namespace)
