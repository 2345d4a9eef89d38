"""Domain values to protobuf messages and back; with addresses.py the only place that knows both.

`*_from_wire` validates: a message that no correct peer sends raises `Invalid`.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

from pyroaring import BitMap
from tessera_wire.identity.v1 import identity_pb2
from tessera_wire.policy.v1 import policy_pb2

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.policy.clauses import (
    Action,
    Clause,
    Direction,
    GroupId,
    LocalPolicy,
    NamedPort,
    PolicyRef,
    PortRange,
    RuleId,
    RuleSource,
    Tier,
)
from services.policy.l7 import Auth, ProxyRule
from services.runtime.errors import Invalid

_U32 = next(code for code in "IL" if array(code).itemsize == 4)


# ------------------------------------------------------------------ identity sets


def pack_ids(ids: Iterable[int]) -> bytes:
    """Little-endian u32 array, ascending, each number once."""
    bitmap = ids if isinstance(ids, BitMap) else BitMap(ids)
    packed: array[int] = bitmap.to_array()
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(packed: bytes) -> BitMap:
    if len(packed) % 4:
        raise Invalid(f"an identity set of {len(packed)} bytes is not an array of u32")
    numbers = array(_U32)
    numbers.frombytes(packed)
    if sys.byteorder == "big":
        numbers.byteswap()
    return BitMap(numbers)


# ------------------------------------------------------------------ labels


def labels_to_wire(labels: Labels) -> identity_pb2.LabelSet:
    return identity_pb2.LabelSet(labels=[str(label) for label in labels])


def labels_from_wire(message: identity_pb2.LabelSet) -> Labels:
    try:
        return Labels.parse(message.labels)
    except ValueError as error:
        raise Invalid(str(error)) from None


# ------------------------------------------------------------------ policy


def ref_to_wire(ref: PolicyRef) -> policy_pb2.PolicyRef:
    return policy_pb2.PolicyRef(kind=ref.kind, namespace=ref.namespace, name=ref.name)


def ref_from_wire(message: policy_pb2.PolicyRef) -> PolicyRef:
    return PolicyRef(message.kind, message.namespace, message.name)


def clause_to_wire(clause: Clause) -> policy_pb2.Clause:
    return policy_pb2.Clause(
        direction=direction_to_wire(clause.direction),
        groups=clause.groups,
        ports=[policy_pb2.PortRange(proto=p.proto, lo=p.lo, hi=p.hi) for p in clause.ports],
        action=_ACTION_TO_WIRE[clause.action],
        rule_id=clause.rule_id,
        names=[policy_pb2.NamedPort(proto=n.proto, name=n.name) for n in clause.names],
        proxy=None if clause.proxy is None else _proxy_to_wire(clause.proxy),
        auth=_AUTH_TO_WIRE[clause.auth],
        tier=_TIER_TO_WIRE[clause.tier],
        order=clause.order,
    )


def _proxy_to_wire(rule: ProxyRule) -> policy_pb2.ProxyRule:
    return policy_pb2.ProxyRule(
        digest=rule.digest,
        parser=rule.parser,
        rules=rule.rules,
        server_names=rule.server_names,
        terminating=rule.terminating,
        originating=rule.originating,
        listener=rule.listener,
        priority=rule.priority,
    )


def _proxy_from_wire(message: policy_pb2.ProxyRule) -> ProxyRule:
    rule = ProxyRule(
        parser=message.parser,
        rules=tuple(message.rules),
        server_names=tuple(message.server_names),
        terminating=message.terminating,
        originating=message.originating,
        listener=message.listener,
        priority=message.priority,
    )
    if rule.digest != message.digest:
        raise Invalid(
            f"L7 rules of {message.parser}: their digest is {rule.digest}, not {message.digest};"
            " do the versions match?"
        )
    return rule


def direction_to_wire(direction: Direction) -> policy_pb2.Direction.ValueType:
    return _DIRECTION_TO_WIRE[direction]


def clause_from_wire(message: policy_pb2.Clause) -> Clause:
    direction = _DIRECTION_FROM_WIRE.get(message.direction)
    action = _ACTION_FROM_WIRE.get(message.action)
    tier = _TIER_FROM_WIRE.get(message.tier)
    known = message.auth in _AUTH_FROM_WIRE
    if direction is None or action is None or tier is None or not known:
        raise Invalid(
            f"clause of rule {message.rule_id}: direction {message.direction}, action"
            f" {message.action}, tier {message.tier} or authentication {message.auth} is unknown;"
            " do the versions match?"
        )
    return Clause(
        direction=direction,
        groups=tuple(GroupId(g) for g in message.groups),
        ports=tuple(_port_range_from_wire(p) for p in message.ports),
        action=action,
        rule_id=RuleId(message.rule_id),
        names=tuple(NamedPort(n.proto, n.name) for n in message.names),
        proxy=_proxy_from_wire(message.proxy) if message.HasField("proxy") else None,
        auth=_AUTH_FROM_WIRE[message.auth],
        tier=tier,
        order=message.order,
    )


def _port_range_from_wire(message: policy_pb2.PortRange) -> PortRange:
    if message.proto > 255 or not message.lo <= message.hi <= 65535:
        raise Invalid(f"port range {message.proto}/{message.lo}-{message.hi} is not one")
    return PortRange(message.proto, message.lo, message.hi)


def local_policy_to_wire(policy: LocalPolicy) -> policy_pb2.LocalPolicy:
    return policy_pb2.LocalPolicy(
        identity=policy.identity,
        ingress_enforced=policy.ingress_enforced,
        egress_enforced=policy.egress_enforced,
        clauses=[clause_to_wire(c) for c in policy.clauses],
        ingress_policies=[ref_to_wire(r) for r in policy.ingress_policies],
        egress_policies=[ref_to_wire(r) for r in policy.egress_policies],
    )


def local_policy_from_wire(message: policy_pb2.LocalPolicy) -> LocalPolicy:
    return LocalPolicy(
        identity=NumericIdentity(message.identity),
        ingress_enforced=message.ingress_enforced,
        egress_enforced=message.egress_enforced,
        clauses=tuple(clause_from_wire(c) for c in message.clauses),
        ingress_policies=tuple(ref_from_wire(r) for r in message.ingress_policies),
        egress_policies=tuple(ref_from_wire(r) for r in message.egress_policies),
    )


def rule_to_wire(rule: RuleSource) -> policy_pb2.Rule:
    return policy_pb2.Rule(
        id=rule.rule_id,
        policy=ref_to_wire(rule.policy),
        rule_index=rule.rule_index,
        clause=rule.clause,
        line=rule.line,
        log=rule.log,
    )


def rule_from_wire(message: policy_pb2.Rule) -> RuleSource:
    return RuleSource(
        rule_id=RuleId(message.id),
        policy=ref_from_wire(message.policy),
        rule_index=message.rule_index,
        clause=message.clause,
        line=message.line,
        log=message.log,
    )


_DIRECTION_TO_WIRE = {
    Direction.INGRESS: policy_pb2.INGRESS,
    Direction.EGRESS: policy_pb2.EGRESS,
}
_DIRECTION_FROM_WIRE = {wire: domain for domain, wire in _DIRECTION_TO_WIRE.items()}
_ACTION_TO_WIRE = {
    Action.ALLOW: policy_pb2.ALLOW,
    Action.DENY: policy_pb2.DENY,
    Action.PASS: policy_pb2.PASS,
}
_ACTION_FROM_WIRE = {wire: domain for domain, wire in _ACTION_TO_WIRE.items()}
_TIER_TO_WIRE = {
    Tier.NETWORK_POLICY: policy_pb2.NETWORK_POLICY_TIER,
    Tier.ADMIN: policy_pb2.ADMIN_TIER,
    Tier.BASELINE: policy_pb2.BASELINE_TIER,
}
_TIER_FROM_WIRE = {wire: domain for domain, wire in _TIER_TO_WIRE.items()}
_AUTH_TO_WIRE = {
    None: policy_pb2.SAYS_NOTHING,
    Auth.DISABLED: policy_pb2.AUTH_DISABLED,
    Auth.SPIRE: policy_pb2.AUTH_SPIRE,
    Auth.ALWAYS_FAIL: policy_pb2.AUTH_ALWAYS_FAIL,
}
_AUTH_FROM_WIRE = {wire: domain for domain, wire in _AUTH_TO_WIRE.items()}
