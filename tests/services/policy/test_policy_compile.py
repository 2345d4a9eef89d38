"""Compilation against the four-line rule, clause by clause."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from identity.numbers import NumericIdentity
from services.policy.clauses import (
    RULE_NONE,
    Action,
    Clause,
    Direction,
    GroupId,
    LocalPolicy,
    PortRange,
    RuleId,
)
from services.policy.compile import (
    Answer,
    Compiled,
    ExactPort,
    PortAnswer,
    PortBlock,
    Verdict,
    compile_direction,
)

TCP, UDP, ICMP, GRE = 6, 17, 1, 47
IN = Direction.INGRESS


def clause(rule, *, groups=(), ports=(), action=Action.ALLOW, direction=IN):
    return Clause(
        direction,
        tuple(GroupId(g) for g in groups),
        tuple(PortRange(*p) for p in ports),
        action,
        RuleId(rule),
    )


def local(*clauses, enforced=True):
    return LocalPolicy(NumericIdentity(1000), enforced, enforced, tuple(clauses), (), ())


def compiled(*clauses, enforced=True) -> Compiled:
    result = compile_direction(local(*clauses, enforced=enforced), IN)
    assert result is not None
    return result


def naive(clauses, members, peer, proto, port) -> PortAnswer:
    def matches(c):
        peers = not c.groups or any(peer in members[g] for g in c.groups)
        return peers and (
            not c.ports or any(p.proto == proto and p.lo <= port <= p.hi for p in c.ports)
        )

    hits = [c for c in clauses if matches(c)]
    for action, verdict in ((Action.DENY, Verdict.DENY), (Action.ALLOW, Verdict.ALLOW)):
        rules = [c.rule_id for c in hits if c.action is action]
        if rules:
            return PortAnswer(verdict, min(rules))
    return PortAnswer(Verdict.NONE, RULE_NONE)


ports_near = st.sampled_from([0, 1, 2, 7, 8, 79, 80, 81, 443, 1023, 1024, 32768, 65534, 65535])
ranges = st.builds(
    lambda proto, a, b: PortRange(proto, min(a, b), max(a, b)),
    st.sampled_from([TCP, UDP, ICMP]),
    ports_near,
    ports_near,
)
random_clauses = st.lists(
    st.tuples(
        st.lists(st.integers(1, 5), max_size=2, unique=True),
        st.lists(ranges, max_size=3),
        st.sampled_from([Action.ALLOW, Action.DENY]),
    ),
    max_size=7,
).map(
    lambda rows: [
        Clause(IN, tuple(GroupId(g) for g in groups), tuple(ports), action, RuleId(16 + n))
        for n, (groups, ports, action) in enumerate(rows)
    ]
)
random_members = st.fixed_dictionaries(
    {GroupId(g): st.sets(st.integers(1, 12)).map(BitMap) for g in range(1, 6)}
)
probes = st.lists(
    st.tuples(st.sampled_from([TCP, UDP, ICMP, GRE]), ports_near | st.integers(0, 65535)),
    min_size=1,
    max_size=8,
)


@given(random_clauses, random_members, probes, st.sets(st.integers(1, 14)).map(BitMap))
@settings(max_examples=400, deadline=None)
def test_compiled_answers_equal_the_four_line_rule(clauses, members, probed, within):
    result = compiled(*clauses)
    full = result.partition(members.__getitem__)
    some = result.partition(members.__getitem__, within)
    for peer in range(15):
        answer = next((a for a, ids in full.items() if peer in ids), result.default)
        for proto, port in probed:
            assert answer.lookup(proto, port) == naive(clauses, members, peer, proto, port)
        if peer in within:
            assert [a for a, ids in some.items() if peer in ids] == [answer]
        else:
            assert not any(peer in ids for ids in some.values())
    assert result.default not in full
    assert sum(len(ids) for ids in some.values()) == len(within)


@given(random_clauses)
@settings(max_examples=200, deadline=None)
def test_rows_say_something_and_nothing_twice(clauses):
    answer = compiled(*(Clause(c.direction, (), c.ports, c.action, c.rule_id) for c in clauses))
    assert_compressed(answer.default)


def assert_compressed(answer: Answer) -> None:
    rows = [*answer.ports, *answer.ranges]
    for row in rows:
        assert row.answer.verdict is not Verdict.NONE
        rest = Answer(
            answer.all,
            tuple(p for p in answer.ports if p != row),
            tuple(b for b in answer.ranges if b != row),
        )
        span = 1 if isinstance(row, ExactPort) else 1 << (16 - row.bits)
        needed = any(
            rest.lookup(row.proto, port) != answer.lookup(row.proto, port)
            for port in range(row.port, row.port + span)
        )
        assert needed, row


def test_an_unenforced_direction_without_clauses_is_open():
    assert compile_direction(local(enforced=False), IN) is None


def test_an_enforced_direction_without_clauses_answers_nothing():
    assert compiled().default == Answer(PortAnswer(Verdict.NONE, RULE_NONE), (), ())


def test_clauses_of_the_other_direction_do_not_count():
    other = clause(16, direction=Direction.EGRESS)
    assert compile_direction(local(other, enforced=False), IN) is None


def test_a_range_becomes_its_minimal_aligned_blocks():
    answer = compiled(clause(16, ports=[(TCP, 443, 450)])).default
    allow = PortAnswer(Verdict.ALLOW, RuleId(16))
    assert answer.ports == (ExactPort(TCP, 443, allow), ExactPort(TCP, 450, allow))
    assert answer.ranges == (PortBlock(TCP, 444, 14, allow), PortBlock(TCP, 448, 15, allow))


def test_ports_one_to_the_last_are_sixteen_rows():
    answer = compiled(clause(16, ports=[(TCP, 1, 65535)])).default
    assert len(answer.ports) + len(answer.ranges) == 16


def test_every_port_of_a_protocol_is_one_block():
    answer = compiled(clause(16, ports=[(TCP, 0, 65535)])).default
    assert answer.ranges == (PortBlock(TCP, 0, 0, PortAnswer(Verdict.ALLOW, RuleId(16))),)
    assert answer.ports == ()
    assert answer.lookup(UDP, 5).verdict is Verdict.NONE


def test_a_hole_cut_by_deny_is_one_row():
    answer = compiled(
        clause(16, ports=[(TCP, 0, 65535)]), clause(17, ports=[(TCP, 22, 22)], action=Action.DENY)
    ).default
    assert answer.ports == (ExactPort(TCP, 22, PortAnswer(Verdict.DENY, RuleId(17))),)
    assert len(answer.ranges) == 1


def test_a_protocol_without_ports_is_answered_by_the_portless_clauses():
    answer = compiled(clause(16), clause(17, ports=[(TCP, 80, 80)], action=Action.DENY)).default
    assert answer.lookup(GRE, 0).verdict is Verdict.ALLOW
    assert answer.lookup(TCP, 80).verdict is Verdict.DENY


def test_identities_that_behave_alike_share_an_answer():
    members = {GroupId(1): BitMap(range(100, 200)), GroupId(2): BitMap(range(150, 250))}
    result = compiled(clause(16, groups=[1]), clause(17, groups=[2], ports=[(TCP, 80, 80)]))
    found = result.partition(members.__getitem__)
    assert sorted(map(len, found.values())) == [50, 100]


def test_members_of_a_group_are_never_changed_by_partition():
    members = {GroupId(1): BitMap([1, 2]), GroupId(2): BitMap([2, 3])}
    result = compiled(clause(16, groups=[1]), clause(17, groups=[1, 2]))
    result.partition(members.__getitem__)
    assert members == {GroupId(1): BitMap([1, 2]), GroupId(2): BitMap([2, 3])}
