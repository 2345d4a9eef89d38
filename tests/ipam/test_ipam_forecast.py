"""When a pool will be used up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.forecast import WINDOW_S, History, exhausted_in_s, slope


def history(*used: int, every_s: float = 60.0) -> History:
    found = History()
    for n, count in enumerate(used):
        found.add(n * every_s, count)
    return found


def test_a_steady_growth_is_its_own_rate() -> None:
    assert slope(history(*range(0, 600, 60)).samples) == pytest.approx(1.0)


def test_too_little_says_nothing() -> None:
    assert slope(history(1, 100, 1000).samples) == 0.0
    assert slope(history(*range(30), every_s=1.0).samples) == 0.0


def test_only_the_last_hour_counts() -> None:
    found = history(*range(1000, 0, -10), *([0] * 61))
    assert found.samples[-1][0] - found.samples[0][0] <= WINDOW_S
    assert slope(found.samples) == pytest.approx(0.0)


@given(st.integers(0, 1000), st.integers(1, 1000), st.floats(0.001, 10))
def test_the_rest_over_the_rate(used: int, left: int, per_second: float) -> None:
    assert exhausted_in_s(used, used + left, per_second) == pytest.approx(left / per_second)
    assert exhausted_in_s(used, used + left, -per_second) is None
    assert exhausted_in_s(used + left, used + left, per_second) == 0.0
    assert exhausted_in_s(used, used + left, 0.0) is None
