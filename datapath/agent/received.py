"""Updates as they arrive, to values."""

from __future__ import annotations

from typing import Final

from tessera_wire.policy.v1 import policy_pb2 as pb

from datapath.agent.view import Address, AddressColumns, GroupDelta, Update
from identity.numbers import NumericIdentity
from services.policy.clauses import GroupId, RuleId
from services.wire import convert

# From here on a few passes over all of them cost less than many steps with each.
MANY: Final = 64


def update_from_wire(message: pb.Update) -> Update:
    """Raises `Invalid` for what no correct policyd sends."""
    digests = message.digests
    addresses = tuple(
        Address(a.cidr, NumericIdentity(a.identity), a.node, a.namespace, a.name)
        for a in message.addresses
    )
    return Update(
        revision=message.revision,
        snapshot=message.snapshot,
        more=message.more,
        groups=tuple(
            (GroupId(group.id), convert.unpack_ids(group.identities)) for group in message.groups
        ),
        group_deltas=tuple(
            GroupDelta(
                GroupId(delta.id),
                convert.unpack_ids(delta.added),
                convert.unpack_ids(delta.removed),
            )
            for delta in message.group_deltas
        ),
        local_policies=tuple(map(convert.local_policy_from_wire, message.local_policies)),
        rules=tuple(map(convert.rule_from_wire, message.rules)),
        addresses=addresses,
        columns=AddressColumns.of(addresses) if len(addresses) > MANY else None,
        addresses_removed=tuple(message.addresses_removed),
        local_policies_removed=tuple(map(NumericIdentity, message.local_policies_removed)),
        groups_removed=tuple(map(GroupId, message.groups_removed)),
        rules_removed=tuple(map(RuleId, message.rules_removed)),
        traceparent=message.traceparent,
        resumed=message.resumed,
        after=message.after,
        instance=message.instance,
        forget_rules=message.forget.rules,
        forget_addresses=tuple(message.forget.addresses),
        policy_digest=digests.policy if digests.HasField("policy") else None,
        addresses_digest=digests.addresses if digests.HasField("addresses") else None,
    )
