"""Which blocks go back: those that stood empty for a while, or that no pool has any more.

A block with a window is its node's: the service cannot know what the node has handed out and not
yet told. The node itself lets go of a window that it does not need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ipam.block import Block
from ipam.view import Claimed, View

EMPTY_FOR_S = 60.0

Since = Mapping[tuple[str, Block], float]


@dataclass(frozen=True, slots=True)
class Reclaim:
    """`empty_since` is the next call's argument."""

    give_back: tuple[Claimed, ...]
    empty_since: Since


def decide(view: View, empty_since: Since, now_s: float, after_s: float = EMPTY_FOR_S) -> Reclaim:
    """`now_s` on a clock that does not go back. A block in use starts anew."""
    give_back: list[Claimed] = []
    since: dict[tuple[str, Block], float] = {}
    for claim in view.blocks():
        if claim.window or not view.idle(claim.pool, claim.block):
            continue
        pool = view.pool(claim.pool)
        started = empty_since.get((claim.pool, claim.block), now_s)
        since[claim.pool, claim.block] = started
        if now_s - started >= after_s or (pool is not None and not pool.owns(claim.block)):
            give_back.append(claim)
    return Reclaim(tuple(give_back), since)
