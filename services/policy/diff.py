"""What a change of policies changes for given connections."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.policy.stage import Ports, Stage


@dataclass(frozen=True, slots=True, order=True)
class Connection:
    source: str
    target: str
    ports: Ports


@dataclass(frozen=True, slots=True)
class Change:
    """`before` and `after` are allow, deny, redirect or auth:<mode>, and differ."""

    connection: Connection
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Difference:
    """changed: let in before and after, but with or without a proxy or a handshake."""

    denied: tuple[Change, ...]
    allowed: tuple[Change, ...]
    changed: tuple[Change, ...]
    unchanged: int


def difference(old: Stage, new: Stage, connections: Iterable[Connection]) -> Difference:
    """Both stages must hold the endpoints that are asked for."""
    found: dict[str, list[Change]] = {"denied": [], "allowed": [], "changed": []}
    unchanged = 0
    for one in connections:
        before = old.verdict(one.source, one.target, one.ports)
        after = new.verdict(one.source, one.target, one.ports)
        if before == after:
            unchanged += 1
            continue
        kind = "denied" if after == "deny" else "allowed" if before == "deny" else "changed"
        found[kind].append(Change(one, before, after))
    return Difference(
        tuple(found["denied"]), tuple(found["allowed"]), tuple(found["changed"]), unchanged
    )
