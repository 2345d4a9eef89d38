"""Clauses that cannot be enforced together on one endpoint.

Known only where policies meet, so not at admission. An endpoint with a conflict keeps the policy
it had.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from services.policy.clauses import (
    Action,
    Clause,
    Direction,
    GroupId,
    LocalPolicy,
    NamedPort,
    PortRange,
)
from services.policy.l7 import joined

_Ports = tuple[Direction, PortRange | NamedPort | None]


def conflict(local: LocalPolicy) -> str:
    """The first one, in words; empty when there is none."""
    return _parsers(local) or _per_peer(local)


def _allows(local: LocalPolicy) -> Iterator[tuple[_Ports, Clause]]:
    for clause in local.clauses:
        if clause.action is Action.ALLOW:
            ports: tuple[PortRange | NamedPort | None, ...] = (*clause.ports, *clause.names)
            for port in ports or (None,):
                yield (clause.direction, port), clause


def _parsers(local: LocalPolicy) -> str:
    held: dict[_Ports, str] = {}
    for at, clause in _allows(local):
        parser = clause.proxy.parser if clause.proxy is not None else ""
        known = held.get(at, "")
        together = joined(known, parser)
        if together is None:
            return f"cannot merge conflicting L7 parsers ({known}/{parser}) at {_words(at)}"
        held[at] = together
    return ""


def _per_peer(local: LocalPolicy) -> str:
    """Of one peer and port: one mode of authentication, one TLS context, one listener per rank."""
    seen: defaultdict[tuple[str, _Ports, GroupId | None, int], set[str]] = defaultdict(set)
    for at, clause in _allows(local):
        for what, rank, text in _choices(clause):
            for group in clause.groups or (None,):
                said = seen[what, at, group, rank]
                said.add(text)
                if len(said) > 1:
                    return f"conflicting {what} at {_words(at)}: {' and '.join(sorted(said))}"
    return ""


def _choices(clause: Clause) -> Iterator[tuple[str, int, str]]:
    if clause.auth is not None:
        yield "authentication", 0, str(clause.auth)
    proxy = clause.proxy
    if proxy is not None and (proxy.terminating or proxy.originating):
        yield "TLS contexts", 0, f"{proxy.terminating} {proxy.originating}"
    if proxy is not None and proxy.listener:
        yield "listeners", proxy.rank, proxy.listener


def _words(at: _Ports) -> str:
    direction, port = at
    match port:
        case None:
            where = "every port"
        case NamedPort(proto, name):
            where = f"port {name} of protocol {proto}"
        case PortRange(proto, lo, hi):
            where = f"port {lo}" if lo == hi else f"ports {lo}-{hi}"
            where += f" of protocol {proto}"
    return f"{direction.name.lower()} {where}"
