"""What an agent holds, said so briefly that policyd can tell what differs.

A digest is 8 bytes of BLAKE2b over an entry's content; of several entries it is their sum, so that
one entry's change is one subtraction and one addition. Addresses, of which there are many, are
divided into buckets by their text. Digests guard against mistakes, not against forgery: whoever
sends one is trusted already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final
from zlib import crc32

from pyroaring import BitMap
from tessera_wire.policy.v1 import policy_pb2

from identity.numbers import NumericIdentity
from services.policy.clauses import GroupId, LocalPolicy, RuleSource
from services.runtime.errors import Invalid
from services.wire.convert import local_policy_to_wire, pack_ids, rule_to_wire

# 100,000 addresses are some 400 a bucket; the column is 2 KiB of a Hello.
BUCKETS: Final = 256
_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Held:
    """`addresses`: by bucket; empty as long as no address is held."""

    instance: str = ""
    revision: int = 0
    identities: Mapping[NumericIdentity, int] = field(default_factory=dict)
    groups: Mapping[GroupId, int] = field(default_factory=dict)
    rules: int = 0
    addresses: tuple[int, ...] = ()


NOTHING: Final = Held()


# ------------------------------------------------------------------ digests


def total(digests: Iterable[int]) -> int:
    return sum(digests) & _MASK


def digest_of_policy(policy: LocalPolicy) -> int:
    return digest_of(local_policy_to_wire(policy).SerializeToString(deterministic=True))


def digest_of_rule(rule: RuleSource) -> int:
    return digest_of(rule_to_wire(rule).SerializeToString(deterministic=True))


def digest_of_group(group: GroupId, members: BitMap) -> int:
    return digest_of(group.to_bytes(8, "little") + pack_ids(members))


def digest_of_address(
    cidr: str, identity: NumericIdentity, node: str, namespace: str, name: str
) -> int:
    return digest_of(f"{cidr} {identity} {node} {namespace} {name}".encode())


def digest_of(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def bucket_of(cidr: str) -> int:
    return crc32(cidr.encode()) % BUCKETS


# ------------------------------------------------------------------ the wire


def held_to_wire(held: Held) -> policy_pb2.Held:
    return policy_pb2.Held(
        instance=held.instance,
        revision=held.revision,
        identities=held.identities.keys(),
        identity_digests=held.identities.values(),
        groups=held.groups.keys(),
        group_digests=held.groups.values(),
        rules=held.rules,
        addresses=held.addresses,
    )


def held_from_wire(message: policy_pb2.Held) -> Held:
    if len(message.identities) != len(message.identity_digests):
        raise Invalid("Held tells of identities and digests, but not as many of each")
    if len(message.groups) != len(message.group_digests):
        raise Invalid("Held tells of groups and digests, but not as many of each")
    if len(message.addresses) not in (0, BUCKETS):
        raise Invalid(f"Held divides addresses into {len(message.addresses)}, not {BUCKETS}")
    identities = map(NumericIdentity, message.identities)
    return Held(
        instance=message.instance,
        revision=message.revision,
        identities=dict(zip(identities, message.identity_digests, strict=True)),
        groups=dict(zip(map(GroupId, message.groups), message.group_digests, strict=True)),
        rules=message.rules,
        addresses=tuple(message.addresses),
    )
