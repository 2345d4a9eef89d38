"""Domain -> message -> bytes -> message -> domain is the identity."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap
from tessera_wire.identity.v1 import identity_pb2
from tessera_wire.ipam.v1 import ipam_pb2
from tessera_wire.policy.v1 import policy_pb2

from identity.labels import Labels
from identity.numbers import NumericIdentity
from ipam.block import parse_block
from ipam.keys import Owner
from ipam.view import Assigned
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
from services.wire import addresses, convert

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
port = st.integers(0, 65535)
word = st.text(st.characters(codec="utf-8"), max_size=8)
refs = st.builds(PolicyRef, word, word, word)
ranges = st.tuples(st.integers(0, 255), port, port).map(
    lambda t: PortRange(t[0], min(t[1:]), max(t[1:]))
)
words = st.lists(word, max_size=3).map(tuple)
proxies = st.builds(ProxyRule, word, words, words, word, word, word, u32)
clauses = st.builds(
    Clause,
    st.sampled_from(Direction),
    st.lists(u64.map(GroupId), max_size=4).map(tuple),
    st.lists(ranges, max_size=4).map(tuple),
    st.sampled_from(Action),
    u32.map(RuleId),
    st.lists(st.builds(NamedPort, st.integers(0, 255), word), max_size=3).map(tuple),
    st.none() | proxies,
    st.none() | st.sampled_from(Auth),
    st.sampled_from(Tier),
    u32,
)
policies = st.builds(
    LocalPolicy,
    u32.map(NumericIdentity),
    st.booleans(),
    st.booleans(),
    st.lists(clauses, max_size=3).map(tuple),
    st.lists(refs, max_size=3).map(tuple),
    st.lists(refs, max_size=3).map(tuple),
)
rules = st.builds(RuleSource, u32.map(RuleId), refs, st.integers(0, 999), word, u32, word)


@given(policies)
def test_a_local_policy_survives_the_wire(policy: LocalPolicy) -> None:
    sent = convert.local_policy_to_wire(policy).SerializeToString()
    received = convert.local_policy_from_wire(policy_pb2.LocalPolicy.FromString(sent))
    assert received == policy
    assert all(isinstance(c.direction, Direction) for c in received.clauses)


@given(rules)
def test_a_rule_survives_the_wire(rule: RuleSource) -> None:
    sent = convert.rule_to_wire(rule).SerializeToString()
    assert convert.rule_from_wire(policy_pb2.Rule.FromString(sent)) == rule


@given(st.sets(u32))
def test_an_identity_set_survives_the_wire(ids: set[int]) -> None:
    packed = convert.pack_ids(ids)
    assert packed == b"".join(i.to_bytes(4, "little") for i in sorted(ids))
    assert convert.pack_ids(BitMap(ids)) == packed
    assert convert.unpack_ids(packed) == BitMap(ids)


def test_labels_survive_the_wire() -> None:
    labels = Labels.parse(["k8s:io.kubernetes.pod.namespace=shop", "k8s:app=web", "k8s:empty="])
    sent = convert.labels_to_wire(labels).SerializeToString()
    assert convert.labels_from_wire(identity_pb2.LabelSet.FromString(sent)) == labels


def test_a_label_that_is_none_is_refused() -> None:
    with pytest.raises(Invalid, match="key is empty"):
        convert.labels_from_wire(identity_pb2.LabelSet(labels=["k8s:=x"]))


def test_an_assigned_address_survives_the_wire() -> None:
    assigned = Assigned(
        "default",
        int(IPv4Address("10.244.0.5")),
        parse_block("10.244.0.0/26"),
        "node-a",
        Owner("shop", "web", "eth0", "u1"),
    )
    sent = addresses.assigned_to_wire(assigned)
    assert (sent.ip, sent.block) == ("10.244.0.5", "10.244.0.0/26")
    assert addresses.assigned_from_wire(ipam_pb2.Address.FromString(sent.SerializeToString())) == (
        assigned
    )


@pytest.mark.parametrize(
    "owner",
    [ipam_pb2.Owner(), ipam_pb2.Owner(namespace="a/b", name="c", interface="eth0")],
)
def test_an_owner_that_cannot_be_a_key_is_refused(owner: ipam_pb2.Owner) -> None:
    with pytest.raises(Invalid, match="namespace"):
        addresses.owner_from_wire(owner)


@pytest.mark.parametrize("text", ["", "10.0.0", "10.0.0.256", "fe80::g", "::1", "web"])
def test_text_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="is not an IP address"):
        addresses.address_from_wire(text)


@pytest.mark.parametrize(
    "message",
    [
        policy_pb2.Clause(direction=policy_pb2.INGRESS),
        policy_pb2.Clause(action=policy_pb2.DENY),
        policy_pb2.Clause(
            direction=policy_pb2.EGRESS,
            action=policy_pb2.ALLOW,
            ports=[policy_pb2.PortRange(proto=6, lo=2, hi=1)],
        ),
        policy_pb2.Clause(
            direction=policy_pb2.EGRESS,
            action=policy_pb2.ALLOW,
            ports=[policy_pb2.PortRange(proto=256, lo=1, hi=1)],
        ),
        policy_pb2.Clause(
            direction=policy_pb2.EGRESS,
            action=policy_pb2.ALLOW,
            proxy=policy_pb2.ProxyRule(parser="http", digest="0" * 16),
        ),
    ],
)
def test_a_clause_no_peer_sends_is_refused(message: policy_pb2.Clause) -> None:
    with pytest.raises(Invalid):
        convert.clause_from_wire(message)


def test_a_set_cut_in_the_middle_is_refused() -> None:
    with pytest.raises(Invalid, match="5 bytes"):
        convert.unpack_ids(b"\1\0\0\0\2")
