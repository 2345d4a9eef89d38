"""Parts of Update messages, encoded once and shared by every subscriber that needs them.

An encoded message whose other fields are unset is a run of one field's entries, and encoded
messages that follow each other merge (protobuf encoding, "last one wins"; repeated fields are
appended). So an Update is a header and any number of such parts, joined.

Addresses are encoded as they change. Everything else is encoded when first asked for and kept while
the revision lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from tessera_wire.policy.v1.policy_pb2 import Address, Group, GroupDelta, Update

from identity.numbers import NumericIdentity
from services.policy.clauses import FIRST_CLAUSE_RULE, GroupId, RuleId
from services.policyd.addresses import Row
from services.policyd.change import ChangeSet
from services.policyd.state import State
from services.wire.convert import local_policy_to_wire, pack_ids, rule_to_wire

# A message this long is written in one go by gRPC, and small enough that one reader's snapshot
# does not hold the loop for long.
MESSAGE_BYTES: Final = 1 << 20
_BLOCK_BYTES: Final = 1 << 18

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Needs:
    """What a local policy refers to."""

    groups: frozenset[GroupId]
    rules: frozenset[RuleId]


@dataclass(frozen=True, slots=True)
class EncodedPolicy:
    part: bytes
    needs: Needs


class Payloads:
    def __init__(self, state: State) -> None:
        self._state = state
        self._addresses: dict[str, bytes] = {}
        self._policies: dict[NumericIdentity, EncodedPolicy] = {}
        self._groups: dict[GroupId, bytes] = {}
        self._rules: dict[RuleId, bytes] = {}
        self._every_address: list[bytes] | None = None
        self.advance(ChangeSet(state.revision, addresses=frozenset(state.addresses.rows)))

    def advance(self, change: ChangeSet) -> None:
        """The state is now what `change` made it."""
        self._policies.clear()
        self._groups.clear()
        for rule in change.rules:
            self._rules.pop(rule, None)
        if not change.addresses:
            return
        self._every_address = None
        rows = self._state.addresses.rows
        for cidr in change.addresses:
            row = rows.get(cidr)
            if row is None:
                self._addresses.pop(cidr, None)
            else:
                self._addresses[cidr] = Update(addresses=(_address(row),)).SerializeToString()

    def policy(self, identity: NumericIdentity) -> EncodedPolicy:
        """The identity must be known to the resolver."""
        return _kept(self._policies, identity, self._encode_policy)

    def group(self, group: GroupId) -> bytes:
        return _kept(self._groups, group, self._encode_group)

    def rule(self, rule: RuleId) -> bytes:
        return _kept(self._rules, rule, self._encode_rule)

    def every_address(self) -> list[bytes]:
        if self._every_address is None:
            self._every_address = list(blocks(self._addresses.values()))
        return self._every_address

    def addresses(self, cidrs: Iterable[str]) -> tuple[list[bytes], list[str]]:
        """Parts for those that exist, and those that do not."""
        parts, gone = [], []
        for cidr in cidrs:
            part = self._addresses.get(cidr)
            if part is None:
                gone.append(cidr)
            else:
                parts.append(part)
        return list(blocks(parts)), gone

    def _encode_policy(self, identity: NumericIdentity) -> EncodedPolicy:
        policy = self._state.resolver.local_policy(identity)
        part = Update(local_policies=(local_policy_to_wire(policy),)).SerializeToString()
        groups = frozenset(group for clause in policy.clauses for group in clause.groups)
        ids = (clause.rule_id for clause in policy.clauses)
        rules = frozenset(rule for rule in ids if rule >= FIRST_CLAUSE_RULE)
        return EncodedPolicy(part, Needs(groups, rules))

    def _encode_group(self, group: GroupId) -> bytes:
        view = self._state.resolver.group(group)
        message = Group(id=group, identities=pack_ids(view.members), selector=view.selector)
        return Update(groups=(message,)).SerializeToString()

    def _encode_rule(self, rule: RuleId) -> bytes:
        source = self._state.resolver.rule(rule)
        assert source is not None, f"a local policy names rule {rule}, which the resolver lacks"
        return Update(rules=(rule_to_wire(source),)).SerializeToString()


class Span:
    """Everything that changed from one position of the log to its end."""

    def __init__(self, change: ChangeSet, payloads: Payloads) -> None:
        self.change = change
        self._payloads = payloads
        self._deltas: dict[GroupId, bytes] = {}
        self._addresses: list[bytes] | None = None
        self._plain: list[bytes] | None = None

    def delta(self, group: GroupId) -> bytes:
        return _kept(self._deltas, group, self._encode_delta)

    def addresses(self) -> list[bytes]:
        """Parts, removals included."""
        if self._addresses is None:
            parts, gone = self._payloads.addresses(self.change.addresses)
            if gone:
                parts.append(Update(addresses_removed=gone).SerializeToString())
            self._addresses = parts
        return self._addresses

    def plain(self) -> list[bytes]:
        """The messages for a subscriber that nothing but addresses concerns."""
        if self._plain is None:
            header = Header(self.change.revision, self.change.traceparent)
            self._plain = list(messages(header, self.addresses()))
        return self._plain

    def _encode_delta(self, group: GroupId) -> bytes:
        change = self.change.deltas[group]
        if not change.added and not change.removed:
            return b""
        delta = GroupDelta(id=group, added=pack_ids(change.added), removed=pack_ids(change.removed))
        return Update(group_deltas=(delta,)).SerializeToString()


@dataclass(frozen=True, slots=True)
class Header:
    revision: int
    traceparent: str = ""
    snapshot: bool = False


def messages(header: Header, parts: Sequence[bytes]) -> Iterator[bytes]:
    """One Update, in as many messages as its size asks for: all but the last with `more`, the
    first alone with `snapshot`. A part is never divided."""
    snapshot = header.snapshot
    start, size = 0, 0
    for end, part in enumerate(parts):
        if size and size + len(part) > MESSAGE_BYTES:
            yield _head(header, snapshot=snapshot, more=True) + b"".join(parts[start:end])
            snapshot, start, size = False, end, 0
        size += len(part)
    yield _head(header, snapshot=snapshot, more=False) + b"".join(parts[start:])


def blocks(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in fewer, larger parts."""
    block: list[bytes] = []
    size = 0
    for part in parts:
        block.append(part)
        size += len(part)
        if size >= _BLOCK_BYTES:
            yield b"".join(block)
            block, size = [], 0
    if block:
        yield b"".join(block)


def _head(header: Header, *, snapshot: bool, more: bool) -> bytes:
    return Update(
        revision=header.revision,
        traceparent=header.traceparent,
        snapshot=snapshot,
        more=more,
    ).SerializeToString()


def _address(row: Row) -> Address:
    return Address(
        cidr=row.cidr,
        identity=row.identity,
        node=row.node,
        namespace=row.namespace,
        name=row.name,
    )


def _kept(cache: dict[K, V], key: K, make: Callable[[K], V]) -> V:
    value = cache.get(key)
    if value is None:
        value = cache[key] = make(key)
    return value
