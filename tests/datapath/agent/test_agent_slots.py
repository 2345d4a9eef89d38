from __future__ import annotations

import pytest

from datapath.agent.classes import Classes
from datapath.agent.slots import SlotNumbers, extends
from services.policy.clauses import Action, Clause, Direction, LocalPolicy, PortRange
from services.policy.compile import Answer, compile_direction
from services.runtime.errors import Exhausted


def answer(*clauses: tuple[Action, int, tuple[PortRange, ...]]) -> Answer:
    made = tuple(Clause(Direction.INGRESS, (), p, a, r) for a, r, p in clauses)
    compiled = compile_direction(LocalPolicy(1, True, True, made, (), ()), Direction.INGRESS)
    assert compiled is not None
    return compiled.default


A, D = Action.ALLOW, Action.DENY
WEB, DNS, HIGH, TCP = (
    (PortRange(6, 80, 80),),
    (PortRange(17, 53, 53),),
    (PortRange(6, 1024, 65535),),
    (PortRange(6, 0, 65535),),
)
NOTHING = answer()


@pytest.mark.parametrize(
    ("old", "new", "silent"),
    [
        (NOTHING, answer((A, 16, ())), True),
        (answer((D, 16, ())), answer((A, 17, ())), True),
        (answer((A, 16, WEB)), answer((A, 16, WEB), (A, 17, DNS)), True),
        (answer((A, 16, WEB)), answer((A, 16, TCP)), True),
        (answer((A, 16, WEB)), answer((A, 17, WEB)), False),
        (answer((A, 16, WEB)), NOTHING, False),
        (answer((A, 16, ())), answer((A, 16, WEB)), False),
        (answer((A, 16, TCP)), answer((A, 16, TCP), (D, 17, HIGH)), False),
        (answer((A, 16, HIGH)), answer((A, 16, HIGH), (D, 17, (PortRange(6, 9000, 9000),))), False),
        (answer((A, 16, WEB)), answer((A, 16, WEB), (D, 17, DNS)), True),
    ],
)
def test_only_what_keeps_every_allowed_port_goes_unjudged(
    old: Answer, new: Answer, *, silent: bool
) -> None:
    assert extends(old, new) is silent
    assert extends(old, old)


def test_equal_port_rows_share_a_class_whatever_the_answer_for_the_rest() -> None:
    classes = Classes()
    some, other = answer((A, 16, WEB)), answer((A, 16, WEB), (A, 18, (PortRange(47, 0, 65535),)))
    assert classes.number(some) == classes.number(answer((A, 16, WEB)))
    assert classes.number(some) != classes.number(other)
    assert classes.number(answer((A, 16, ()))) == 0


def test_a_class_number_is_not_given_twice() -> None:
    classes = Classes()
    first = classes.number(answer((A, 16, WEB)))
    classes.mark_written([first])
    assert len(classes.take_unused()) == 1
    assert classes.number(answer((A, 16, WEB))) == first + 1


def test_slot_numbers_go_round_and_end() -> None:
    numbers = SlotNumbers(4)
    assert [numbers.take(), numbers.take()] == [1, 2]
    numbers.free(1)
    assert numbers.take() == 3
    assert numbers.take() == 1
    with pytest.raises(Exhausted, match="all 3 policy slots"):
        numbers.take()
