"""Records of the ring as columns: which are flows, and which of those are explained alike.

    raw bytes ──► columns ──► flows only ──► one number per record ──► the first of each kind
                                             (all an explanation depends on, mixed into 64 bits)

The only user of numpy. Two kinds that share a number would be explained alike; the mix is keyed by
a number of this process, so that nobody who chooses addresses can look for such a pair.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from datapath.maps.layout import EVENT_LAYOUT, Event, EventType, Verdict
from datapath.maps.ring import RECORD_SIZE, Records

_COLUMN: Final = {"Q": "<u8", "I": "<u4", "H": "<u2", "B": "u1", "16s": "(2,)<u8"}
# What tells one explanation from another: who judged, by which rule, why, and the two ends.
_KEY: Final = ("endpoint", "rule_id", "direction", "type", "reason", "saddr", "daddr")

Column = NDArray[np.uint64]


def _columns() -> np.dtype[np.void]:
    codes: list[str] = []
    for count, code in re.findall(r"(\d*)([A-Za-z])", EVENT_LAYOUT.format):
        codes += [count + code] if code == "s" else [code] * int(count or 1)
    codes = [code for code in codes if code != "x"]
    fields = [(name, _COLUMN[code]) for name, code in zip(Event._fields, codes, strict=True)]
    body = np.dtype(fields)
    assert body.itemsize <= EVENT_LAYOUT.size
    header = RECORD_SIZE - EVENT_LAYOUT.size
    assert body.fields is not None
    return np.dtype(
        {
            "names": list(Event._fields),
            "formats": [kind for _, kind in fields],
            "offsets": [header + body.fields[name][1] for name in Event._fields],
            "itemsize": RECORD_SIZE,
        }
    )


_COLUMNS: Final = _columns()
_SEED, _FACTOR = (np.uint64(int.from_bytes(os.urandom(8), "little") | 1) for _ in "ab")
_SHIFT: Final = np.uint64(29)


@dataclass(frozen=True, slots=True)
class Kinds:
    """`flows`: the records that are flows of their own; `first`: where in them each kind comes
    first; `of`: the kind of each."""

    flows: Records
    first: list[int]
    of: NDArray[np.intp]


def kinds(records: Records) -> Kinds:
    """A refused packet has two records: what the judge said, and the drop, which says all of it."""
    rows = np.frombuffer(records.raw, dtype=_COLUMNS)
    verdict = rows["verdict"]
    told = rows["type"] == EventType.DROP
    told |= (verdict == Verdict.ALLOW) | (verdict == Verdict.REDIRECT)
    if not told.all():
        rows = rows[told]
        records = Records(rows.tobytes())
    _, first, of = np.unique(_mixed(rows), return_index=True, return_inverse=True)
    return Kinds(records, first.tolist(), of)


def _mixed(rows: NDArray[Any]) -> Column:
    found: Column = np.full(len(rows), _SEED, dtype=np.uint64)
    for name in _KEY:
        column = rows[name]
        for part in column.T if column.ndim > 1 else (column,):
            found += part
            found *= _FACTOR
            found ^= found >> _SHIFT
    return found
