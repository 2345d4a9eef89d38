"""Parts of Update messages, encoded once and shared by every subscriber that needs them.

An encoded message whose other fields are unset is a run of one field's entries, and encoded
messages that follow each other merge (protobuf encoding, "last one wins"; repeated fields are
appended). So an Update is a header and any number of such parts, joined.

Addresses are encoded as they change. Everything else is encoded, and digested, when first asked for
and kept until it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from tessera_wire.policy.v1.policy_pb2 import Digests, Forget, Group, GroupDelta, Update

from identity.numbers import NumericIdentity
from services.policy.clauses import FIRST_CLAUSE_RULE, GroupId, RuleId
from services.policyd.address_parts import AddressParts
from services.policyd.change import ChangeSet
from services.policyd.state import State
from services.wire.convert import local_policy_to_wire, pack_ids, rule_to_wire
from services.wire.held import digest_of_group, digest_of_policy, digest_of_rule, total

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
    digest: int
    needs: Needs


@dataclass(frozen=True, slots=True)
class EncodedRule:
    part: bytes
    digest: int


@dataclass(frozen=True, slots=True)
class Header:
    """`snapshot`, `resumed`, `instance` and `forget` go with the first message, `digests` with the
    last, the others with each."""

    revision: int
    after: int = 0
    traceparent: str = ""
    snapshot: bool = False
    resumed: bool = False
    instance: str = ""
    forget: Forget | None = None
    digests: Digests | None = None

    def encode(self, *, first: bool, last: bool) -> bytes:
        return Update(
            revision=self.revision,
            after=self.after,
            traceparent=self.traceparent,
            more=not last,
            snapshot=first and self.snapshot,
            resumed=first and self.resumed,
            instance=self.instance if first else "",
            forget=self.forget if first else None,
            digests=self.digests if last else None,
        ).SerializeToString()


# Digests of groups that went are forgotten together once there are this many more than groups.
_STALE_DIGESTS: Final = 4096


class Payloads:
    def __init__(self, state: State, message_bytes: int = MESSAGE_BYTES) -> None:
        self._state = state
        self._message_bytes = message_bytes
        self.addresses = AddressParts()
        self._policies: dict[NumericIdentity, EncodedPolicy] = {}
        self._groups: dict[GroupId, bytes] = {}
        self._group_digests: dict[GroupId, int] = {}
        self._rules: dict[RuleId, EncodedRule] = {}
        self._every_address: list[bytes] | None = None
        self.advance(ChangeSet(state.revision, addresses=frozenset(state.addresses.rows)))

    def advance(self, change: ChangeSet) -> None:
        """The state is now what `change` made it."""
        for identity in change.locals:
            self._policies.pop(NumericIdentity(identity), None)
        self._groups.clear()
        self._every_address = None
        for group in (*change.groups, *change.deltas):
            self._group_digests.pop(group, None)
        if len(self._group_digests) > self._state.groups + _STALE_DIGESTS:
            self._group_digests.clear()
        for rule in change.rules:
            self._rules.pop(rule, None)
        rows = self._state.addresses.rows
        for cidr in change.addresses:
            row = rows.get(cidr)
            if row is None:
                self.addresses.remove(cidr)
            else:
                self.addresses.put(row)

    def policy(self, identity: NumericIdentity) -> EncodedPolicy:
        """The identity must be known to the resolver."""
        return _kept(self._policies, identity, self._encode_policy)

    def group(self, group: GroupId) -> bytes:
        return _kept(self._groups, group, self._encode_group)

    def group_digest(self, group: GroupId) -> int:
        return _kept(self._group_digests, group, self._digest_group)

    def rule(self, rule: RuleId) -> EncodedRule:
        return _kept(self._rules, rule, self._encode_rule)

    def rules_digest(self, rules: Iterable[RuleId]) -> int:
        return total(self.rule(rule).digest for rule in rules)

    def parts_of(self, cidrs: Iterable[str]) -> tuple[list[bytes], list[str]]:
        """Of addresses: parts for those that exist, and those that do not."""
        parts, gone = [], []
        for cidr in cidrs:
            part = self.addresses.find(cidr)
            if part is None:
                gone.append(cidr)
            else:
                parts.append(part)
        return list(blocks(parts)), gone

    def every_address(self) -> list[bytes]:
        """Messages in the middle of a snapshot, the same for all that are made at this revision."""
        if self._every_address is None:
            header = Header(self._state.revision)
            self._every_address = [
                header.encode(first=False, last=False) + block
                for block in blocks(self.addresses.every(), self._message_bytes)
            ]
        return self._every_address

    def messages(
        self, header: Header, parts: Sequence[bytes], shared: Sequence[bytes] = ()
    ) -> Iterator[bytes]:
        """One Update, in as many messages as its size asks for: all but the last with `more`. A
        part is never divided. `shared`: whole messages that go in between."""
        pieces = list(blocks(parts, self._message_bytes)) or [b""]
        for at, piece in enumerate(pieces, start=1):
            last = at == len(pieces) and not shared
            yield header.encode(first=at == 1, last=last) + piece
        yield from shared
        if shared:
            yield header.encode(first=False, last=True)

    def _encode_policy(self, identity: NumericIdentity) -> EncodedPolicy:
        policy = self._state.resolver.local_policy(identity)
        part = Update(local_policies=(local_policy_to_wire(policy),)).SerializeToString()
        groups = frozenset(group for clause in policy.clauses for group in clause.groups)
        ids = (clause.rule_id for clause in policy.clauses)
        rules = frozenset(rule for rule in ids if rule >= FIRST_CLAUSE_RULE)
        return EncodedPolicy(part, digest_of_policy(policy), Needs(groups, rules))

    def _encode_group(self, group: GroupId) -> bytes:
        view = self._state.resolver.group(group)
        message = Group(id=group, identities=pack_ids(view.members), selector=view.selector)
        return Update(groups=(message,)).SerializeToString()

    def _digest_group(self, group: GroupId) -> int:
        return digest_of_group(group, self._state.resolver.group(group).members)

    def _encode_rule(self, rule: RuleId) -> EncodedRule:
        source = self._state.resolver.rule(rule)
        assert source is not None, f"a local policy names rule {rule}, which the resolver lacks"
        part = Update(rules=(rule_to_wire(source),)).SerializeToString()
        return EncodedRule(part, digest_of_rule(source))


class Span:
    """Everything that changed from one position of the log, at revision `after`, to its end."""

    def __init__(self, change: ChangeSet, after: int, payloads: Payloads) -> None:
        self.change = change
        self.after = after
        self._payloads = payloads
        self._deltas: dict[GroupId, bytes] = {}
        self._addresses: list[bytes] | None = None
        self._plain: list[bytes] | None = None

    def delta(self, group: GroupId) -> bytes:
        return _kept(self._deltas, group, self._encode_delta)

    def addresses(self) -> list[bytes]:
        """Parts, removals included."""
        if self._addresses is None:
            parts, gone = self._payloads.parts_of(self.change.addresses)
            if gone:
                parts.append(Update(addresses_removed=gone).SerializeToString())
            self._addresses = parts
        return self._addresses

    def plain(self) -> list[bytes]:
        """The messages for a subscriber that nothing but addresses concerns."""
        if self._plain is None:
            self._plain = list(self._payloads.messages(self.header(), self.addresses()))
        return self._plain

    def header(self, policy: int | None = None) -> Header:
        """`policy`: see Digests."""
        digests = Digests(policy=policy, addresses=self._payloads.addresses.digest)
        change = self.change
        return Header(
            change.revision, after=self.after, traceparent=change.traceparent, digests=digests
        )

    def _encode_delta(self, group: GroupId) -> bytes:
        change = self.change.deltas[group]
        if not change.added and not change.removed:
            return b""
        delta = GroupDelta(id=group, added=pack_ids(change.added), removed=pack_ids(change.removed))
        return Update(group_deltas=(delta,)).SerializeToString()


def blocks(parts: Iterable[bytes], most: int = _BLOCK_BYTES) -> Iterator[bytes]:
    """The same bytes in fewer, larger parts."""
    block: list[bytes] = []
    size = 0
    for part in parts:
        block.append(part)
        size += len(part)
        if size >= most:
            yield b"".join(block)
            block, size = [], 0
    if block:
        yield b"".join(block)


def _kept(cache: dict[K, V], key: K, make: Callable[[K], V]) -> V:
    value = cache.get(key)
    if value is None:
        value = cache[key] = make(key)
    return value
