"""Compiled answers against the decision clause by clause: L7, authentication, tiers, port names."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from identity.numbers import NumericIdentity
from services.policy.blocks import Verdict
from services.policy.clauses import (
    Action,
    Clause,
    Direction,
    GroupId,
    LocalPolicy,
    NamedPort,
    PortRange,
    RuleId,
    Tier,
)
from services.policy.compile import compile_direction
from services.policy.l7 import NO_PROXY, Auth, ProxyRule, joined, merge
from services.policy.ranked import DEFAULT_DENY, OPEN, Claim, decide_ranked

IN = Direction.INGRESS
PORTS = (0, 79, 80, 81, 443, 1024, 65535)
HTTP = ProxyRule("http", ("GET",))
NAMES = {NamedPort(6, "http"): 80}

ranges = st.builds(
    lambda proto, a, b: PortRange(proto, min(a, b), max(a, b)),
    st.sampled_from([6, 17]),
    st.sampled_from(PORTS),
    st.sampled_from(PORTS),
)
groups = st.lists(st.integers(1, 4).map(GroupId), max_size=2, unique=True).map(tuple)
names = st.lists(st.sampled_from([NamedPort(6, "http"), NamedPort(6, "nowhere")]), max_size=1).map(
    tuple
)


@st.composite
def clause_lists(draw):
    made = []
    for n in range(draw(st.integers(0, 6))):
        tier = draw(st.sampled_from([Tier.NETWORK_POLICY, *Tier]))
        plain = tier is Tier.NETWORK_POLICY
        actions = [Action.ALLOW, Action.DENY] if plain else list(Action)
        action = draw(st.sampled_from(actions))
        allows = plain and action is Action.ALLOW
        made.append(
            Clause(
                IN,
                draw(groups),
                tuple(draw(st.lists(ranges, max_size=2))),
                action,
                RuleId(16 + n),
                draw(names),
                draw(st.sampled_from([None, None, HTTP])) if allows else None,
                draw(st.sampled_from([None, None, *Auth])) if allows else None,
                tier,
                0 if plain else draw(st.integers(1, 3)),
            )
        )
    return made


def claims(written, members, peer, proto, port):
    for clause in written:
        if clause.groups and not any(peer in members[group] for group in clause.groups):
            continue
        known = [PortRange(n.proto, NAMES[n], NAMES[n]) for n in clause.names if n in NAMES]
        if not clause.ports and not clause.names:
            yield Claim(0, 65535, clause, anywhere=True)
        for held in (*clause.ports, *known):
            if held.proto == proto and held.lo <= port <= held.hi:
                yield Claim(held.lo, held.hi, clause)


def said(answer):
    """Of a refusal it does not matter which row says it."""
    if answer in (DEFAULT_DENY,) or answer.verdict is Verdict.NONE:
        return "nothing"
    return answer.verdict, answer.rule_id, answer.proxy


@settings(max_examples=400, deadline=None)
@given(
    clause_lists(),
    st.dictionaries(st.integers(1, 4), st.sets(st.integers(256, 260)).map(BitMap)),
    st.booleans(),
    st.sampled_from([6, 17, 47]),
    st.sampled_from(PORTS),
)
def test_compiled_answers_equal_the_decision_clause_by_clause(
    written, members, isolated, proto, port
):
    held = {group: members.get(group, BitMap()) for group in range(1, 5)}
    local = LocalPolicy(NumericIdentity(1000), isolated, isolated, tuple(written), (), ())
    compiled = compile_direction(local, IN, NAMES)
    peers = range(256, 262)
    answers = {}
    if compiled is not None:
        for answer, who in compiled.partition(held.__getitem__, BitMap(peers)).items():
            answers.update((peer, answer) for peer in who)
    for peer in peers:
        wanted = decide_ranked(claims(written, held, peer, proto, port), isolated=isolated)
        if compiled is None:
            assert wanted == OPEN
        else:
            assert said(answers[peer].lookup(proto, port)) == said(wanted)


def test_a_matching_clause_without_l7_lets_any_request_through():
    assert merge([None, None]) == NO_PROXY
    (strict,) = merge([HTTP, ProxyRule("http", ("PUT",))]).parts
    assert (strict.rules, strict.any_request) == (("GET", "PUT"), False)
    (open_,) = merge([HTTP, None]).parts
    assert open_.any_request


def test_the_digest_of_a_set_does_not_depend_on_the_order_of_its_clauses():
    other = ProxyRule("kafka", ("topic",))
    assert merge([HTTP, other, None]).digest == merge([None, other, HTTP]).digest
    assert merge([HTTP]).digest != merge([HTTP, None]).digest


def test_parsers_share_a_port_only_along_the_merge_order():
    assert joined("", "http") == joined("http", "") == joined("tls", "http") == "http"
    assert joined("dns", "dns") == "dns"
    assert joined("http", "kafka") is None
    assert joined("dns", "tls") is None
    assert joined("crd", "http") is None
