"""Identities, as REST shows them."""

from __future__ import annotations

from msgspec import Struct


class Identity(Struct, frozen=True):
    """`scope`: reserved, well-known, cluster or local. `nodes`: those that use it."""

    id: int
    labels: tuple[str, ...]
    nodes: tuple[str, ...]
    scope: str


class Identities(Struct, frozen=True):
    """`next`: give it as `cursor` to go on; empty on the last page."""

    identities: tuple[Identity, ...]
    next: str = ""
