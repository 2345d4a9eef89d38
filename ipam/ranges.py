"""Sets of addresses as sorted, disjoint (first, last) pairs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

Range = tuple[int, int]
Ranges = tuple[Range, ...]


def merged(ranges: Iterable[Range]) -> Ranges:
    """Overlapping and touching ones become one."""
    out: list[Range] = []
    for first, last in sorted(ranges):
        if out and first <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], last))
        else:
            out.append((first, last))
    return tuple(out)


def around(ranges: Ranges, address: int) -> Range | None:
    """The range that holds `address`."""
    at = bisect_right(ranges, address, key=lambda pair: pair[0]) - 1
    return ranges[at] if at >= 0 and ranges[at][1] >= address else None


def within(ranges: Ranges, first: int, last: int) -> Ranges:
    """The parts that lie in first..last."""
    at = max(0, bisect_right(ranges, first, key=lambda pair: pair[0]) - 1)
    out: list[Range] = []
    for low, high in ranges[at:]:
        if low > last:
            break
        if high >= first:
            out.append((max(low, first), min(high, last)))
    return tuple(out)


def without(ranges: Iterable[Range], taken: Ranges) -> Ranges:
    """What `taken` leaves of `ranges`."""
    out: list[Range] = []
    for first, last in ranges:
        at = first
        for low, high in within(taken, first, last):
            if low > at:
                out.append((at, low - 1))
            at = high + 1
        if at <= last:
            out.append((at, last))
    return merged(out)


def size(ranges: Iterable[Range]) -> int:
    return sum(last - first + 1 for first, last in ranges)
