"""Maps of an earlier layout, carried over to this version's.

A layout has a folder of its own below bpf_dir, so that the programs of both versions run side by
side while the interfaces change over:

    <bpf_dir>/maps     the first layout: IPv4 alone, one answer per policy row
    <bpf_dir>/maps2    today's

    open: new maps ─► rows carried over ─► agent puts them in order ─► programs exchanged ─► forget

Endpoint rows are written last and say that the rest is there: whoever finds some carries nothing
over again, and a start that was killed in between begins anew. Flows that begin between the copy
and the exchange are judged again, as after a loss of the conntrack table.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from struct import Struct
from typing import Final

from datapath.maps.flows import CtFlags
from datapath.maps.layout import Codec
from datapath.maps.table import KernelTable, Page
from datapath.maps.tables import Tables

FIRST_DIR: Final = "maps"

_PEER_ADDED: Final = 8  # staged answer
_ANSWER_ADDED: Final = 8
_ENDPOINT_ADDED: Final = 16  # IPv6 address
_CT_KEY: Final = Struct("=4s4s2s2sB3x")
_CT_VALUE: Final = 88
_CT_FLAGS_AT: Final = 40
_CT_NEW_KEY: Final = Struct("=16s16s2s2sB3x")
_MAPPED: Final = bytes(10) + b"\xff\xff"

Change = Callable[[bytes, bytes, int], tuple[bytes, bytes]]


def carry_over(bpf_dir: Path, tables: Tables) -> None:
    """Fills this layout's maps from the first one's, if it was in use here and nobody did before.
    Exhausted: a map is configured smaller than what is in use."""
    old = bpf_dir / FIRST_DIR
    if not (old / "endpoints").exists() or tables.endpoints.count():
        return
    for name, key, value, added in (
        ("local4", 4, 4, 0),
        ("ipcache4", 4, 8, 0),
        ("ipcache4_prefix", 8, 8, 0),
        ("policy_slot", 4, 4, 0),
        ("policy_port", 8, 8, _ANSWER_ADDED),
        ("policy_range", 12, 8, _ANSWER_ADDED),
        ("policy_peer", 8, 12, _PEER_ADDED),
    ):
        _copy(old / name, key, value, getattr(tables, name), _longer(value, added))
    _copy(old / "ct4", _CT_KEY.size, _CT_VALUE, tables.ct, carried_flows)
    longer = _longer(36, _ENDPOINT_ADDED)
    _copy(old / "endpoints", 4, 36, tables.endpoints, longer)


def forget(bpf_dir: Path) -> None:
    """Once no interface runs the old programs any more. Idempotent."""
    shutil.rmtree(bpf_dir / FIRST_DIR, ignore_errors=True)


def _raw(size: int) -> Codec[bytes]:
    return Codec(size, bytes, bytes)


def _copy(path: Path, key: int, value: int, into: object, change: Change) -> None:
    assert isinstance(into, KernelTable)
    table = KernelTable.open(path, _raw(key), _raw(value))
    try:
        for page in list(table.items_packed()):
            into.put_packed(*_changed(page, change))
    finally:
        table.close()


def _changed(page: Page, change: Change) -> Page:
    keys, values, count = page
    return (*change(keys, values, count), count)


def _longer(size: int, added: int) -> Change:
    """Rows with zeros at their end, which mean what the first layout meant."""

    def change(keys: bytes, values: bytes, count: int) -> tuple[bytes, bytes]:
        zeros = bytes(added)
        rows = (values[at : at + size] + zeros for at in range(0, count * size, size))
        return keys, b"".join(rows) if added else values

    return change


def carried_flows(keys: bytes, values: bytes, count: int) -> tuple[bytes, bytes]:
    """The two ends change places where the new order has them the other way round."""
    new_keys, new_values = bytearray(), bytearray()
    for number, (first, second, port, other, proto) in enumerate(_CT_KEY.iter_unpack(keys)):
        value = bytearray(values[number * _CT_VALUE : (number + 1) * _CT_VALUE])
        ends = [(_MAPPED + first, port), (_MAPPED + second, other)]
        if _place(*ends[0]) > _place(*ends[1]):
            ends.reverse()
            value[_CT_FLAGS_AT] ^= CtFlags.INITIATOR_1
        (a, p), (b, q) = ends
        new_keys += _CT_NEW_KEY.pack(a, b, p, q, proto)
        new_values += value
    return bytes(new_keys), bytes(new_values)


def _place(address: bytes, port: bytes) -> tuple[int, int]:
    """As ct_source_is_second compares: whole words as the processor loads them."""
    return int.from_bytes(address[12:], sys.byteorder), int.from_bytes(port, sys.byteorder)
