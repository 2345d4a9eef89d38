"""Garbage is looked for as before, once what was built stands."""

from __future__ import annotations

import gc

import pytest

from services.runtime import garbage


def test_nothing_is_looked_for_while_building_and_then_as_before() -> None:
    assert gc.isenabled()
    with garbage.building():
        assert not gc.isenabled()
        with garbage.building():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_failure_while_building_does_not_end_the_looking() -> None:
    with pytest.raises(KeyError), garbage.building():
        raise KeyError
    assert gc.isenabled()
