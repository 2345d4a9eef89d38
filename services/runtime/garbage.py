"""When Python looks for garbage: not while much is built that holds none.

Looking costs in proportion to all that lives, over and over as it grows: half of the time that
reading a large listing takes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def building() -> Iterator[None]:
    """No look for garbage in here."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def settled() -> None:
    """What lives now is there to stay: it is not looked at again."""
    gc.collect()
    gc.freeze()
