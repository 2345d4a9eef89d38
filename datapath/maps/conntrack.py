"""Forgetting flows from user space."""

from __future__ import annotations

from collections.abc import Iterator

from datapath.maps.flows import CtEntry, CtKey
from datapath.maps.layout import ADDRESS6
from datapath.maps.table import Table

_KEY = CtKey.LAYOUT.size
_ENDS = (0, ADDRESS6.size)


def forget_address(ct: Table[CtKey, CtEntry], address: int) -> int:
    """Removes every flow of `address` (as layout.mapped spells it); how many there were. Walks the
    whole table.

    For an endpoint that is gone: replies to its old flows must not reach the next owner of the
    address, as replies are not judged.
    """
    found = [key for keys, _, _ in ct.items_packed() for key in _of(address, keys)]
    return ct.delete_packed(b"".join(found), len(found))


def _of(address: int, keys: bytes) -> Iterator[bytes]:
    """Searched as text: a table of flows is large, those of one address are few."""
    wanted = ADDRESS6.pack(address)
    at = keys.find(wanted)
    while at >= 0:
        row, offset = divmod(at, _KEY)
        if offset in _ENDS:
            yield keys[row * _KEY : (row + 1) * _KEY]
            at = keys.find(wanted, (row + 1) * _KEY)
        else:
            at = keys.find(wanted, at + 1)
