"""Forgetting flows from user space."""

from __future__ import annotations

from datapath.maps.layout import CtEntry, CtKey
from datapath.maps.table import Table


def forget_address(ct4: Table[CtKey, CtEntry], address: int) -> int:
    """Removes every flow of `address`; how many there were. Walks the whole table.

    For an endpoint that is gone: replies to its old flows must not reach the next owner of the
    address, as replies are not judged.
    """
    return ct4.delete_many([key for key, _ in ct4.items() if address in key.addr])
