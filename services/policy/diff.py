"""What a change of policies changes for given connections."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.policy.evaluate import word_of
from services.policy.questions import Ports, Questions


@dataclass(frozen=True, slots=True, order=True)
class Connection:
    source: str
    target: str
    ports: Ports


@dataclass(frozen=True, slots=True)
class Change:
    """`before` and `after` are allow, deny, redirect or auth:<mode>, and differ.

    because: what the end that changed its mind says now.
    """

    connection: Connection
    before: str
    after: str
    because: str


@dataclass(frozen=True, slots=True)
class Difference:
    """changed: let in before and after, but with or without a proxy or a handshake."""

    denied: tuple[Change, ...]
    allowed: tuple[Change, ...]
    changed: tuple[Change, ...]
    unchanged: int


def difference(old: Questions, new: Questions, connections: Iterable[Connection]) -> Difference:
    """Both must know the ends that are asked for."""
    found: dict[str, list[Change]] = {"denied": [], "allowed": [], "changed": []}
    unchanged = 0
    for one in connections:
        before = old.verdict(one.source, one.target, one.ports)
        after = new.verdict(one.source, one.target, one.ports)
        if before == after:
            unchanged += 1
            continue
        kind = "denied" if after == "deny" else "allowed" if before == "deny" else "changed"
        found[kind].append(Change(one, before, after, _because(old, new, one)))
    return Difference(
        tuple(found["denied"]), tuple(found["allowed"]), tuple(found["changed"]), unchanged
    )


def _because(old: Questions, new: Questions, one: Connection) -> str:
    """Of the ends that answer otherwise now, the one that decides; in the words of the new one."""
    asked = one.source, one.target, one.ports
    pairs = zip(old.explain(*asked), new.explain(*asked), strict=True)
    changed = [now for was, now in pairs if word_of(was.answer) != word_of(now.answer)]
    denying = [reason for reason in changed if not reason.passes]
    return "; ".join(reason.words for reason in (denying[:1] or changed))
