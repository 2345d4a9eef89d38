"""Port answers of one protocol as the fewest aligned blocks a longest-prefix lookup needs.

    ranges with verdicts --steps--> answer from each port on --blocks--> aligned blocks

The blocks are those of optimal routing table construction (Draves et al., 1999), with one bound:
no block covers a port that has no answer, so that no row ever says "no answer".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from heapq import heappop, heappush

from services.policy.clauses import RULE_NONE, Action, RuleId
from services.policy.l7 import NO_PROXY, Auth, ProxySet

PORT_BITS = 16
LAST_PORT = (1 << PORT_BITS) - 1


class Verdict(IntEnum):
    """As enum verdict in datapath/bpf/abi.h."""

    NONE = 0
    ALLOW = 1
    DENY = 2
    REDIRECT = 3


@dataclass(frozen=True, slots=True, order=True)
class PortAnswer:
    """What is decided and by which clause. NONE carries RULE_NONE: default deny.

    proxy: what a proxy has to check; only of a REDIRECT. auth: the handshake that is asked for
    before anything passes.
    """

    verdict: Verdict
    rule_id: RuleId
    proxy: ProxySet = NO_PROXY
    auth: Auth = Auth.DISABLED


NO_ANSWER = PortAnswer(Verdict.NONE, RULE_NONE)

# Strongest first.
_VERDICT_OF = {Action.DENY: Verdict.DENY, Action.ALLOW: Verdict.ALLOW}


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """A clause's say on the ports lo..hi."""

    lo: int
    hi: int
    action: Action
    rule_id: RuleId


Step = tuple[int, PortAnswer]
Block = tuple[int, int, PortAnswer]


def decide(spans: Iterable[Span]) -> PortAnswer:
    """Any deny -> DENY, else any allow -> ALLOW, else NONE; named by the lowest rule id."""
    ranked = [(-_VERDICT_OF[span.action], span.rule_id) for span in spans]
    if not ranked:
        return NO_ANSWER
    verdict, rule_id = min(ranked)
    return PortAnswer(Verdict(-verdict), rule_id)


def steps(spans: Sequence[Span]) -> list[Step]:
    """The answer from each listed port up to the next one; the first is port 0."""
    edges = sorted({0} | {s.lo for s in spans} | {s.hi + 1 for s in spans if s.hi < LAST_PORT})
    pending = sorted(spans, reverse=True)
    active: dict[Action, list[tuple[RuleId, int]]] = {Action.DENY: [], Action.ALLOW: []}
    found: list[Step] = []
    for port in edges:
        while pending and pending[-1].lo <= port:
            span = pending.pop()
            heappush(active[span.action], (span.rule_id, span.hi))
        answer = _top(active, port)
        if not found or found[-1][1] != answer:
            found.append((port, answer))
    return found


def _top(active: dict[Action, list[tuple[RuleId, int]]], port: int) -> PortAnswer:
    for action, verdict in _VERDICT_OF.items():
        heap = active[action]
        while heap and heap[0][1] < port:
            heappop(heap)
        if heap:
            return PortAnswer(verdict, heap[0][0])
    return NO_ANSWER


@dataclass(frozen=True, slots=True)
class _Node:
    """`candidates`: answers with which this block and those below it need the fewest rows."""

    lo: int
    bits: int
    candidates: frozenset[PortAnswer]
    halves: tuple[_Node, _Node] | None


def blocks(step_list: Sequence[Step], fallback: PortAnswer) -> Iterator[Block]:
    """(port, bits, answer) rows such that the longest match, or `fallback`, equals the steps.

    `fallback` must be NONE wherever a step is NONE.
    """
    if _lonely(step_list, fallback):
        yield from ((port, PORT_BITS, answer) for port, answer in step_list if answer != fallback)
        return
    starts = [port for port, _ in step_list]
    answers = [answer for _, answer in step_list]
    yield from _emit(_node(starts, answers, 0, 0), fallback)


def _lonely(step_list: Sequence[Step], fallback: PortAnswer) -> bool:
    """Single ports with the fallback around them, as most policies are: no block saves a row.

    A block would hold a port of the fallback for each port it is meant for.
    """
    open_at = -1  # where a port began that has to end with the next step
    for port, answer in step_list:
        if answer == fallback:
            if open_at not in (-1, port - 1):
                return False
            open_at = -1
        elif open_at != -1:
            return False
        else:
            open_at = port
    return open_at in (-1, LAST_PORT)


def _node(starts: Sequence[int], answers: Sequence[PortAnswer], lo: int, bits: int) -> _Node:
    hi = lo + (1 << (PORT_BITS - bits)) - 1
    at = bisect_right(starts, lo) - 1
    if at + 1 == len(starts) or starts[at + 1] > hi:
        return _Node(lo, bits, frozenset((answers[at],)), None)
    left = _node(starts, answers, lo, bits + 1)
    right = _node(starts, answers, lo + (1 << (PORT_BITS - bits - 1)), bits + 1)
    if NO_ANSWER in left.candidates or NO_ANSWER in right.candidates:
        return _Node(lo, bits, frozenset((NO_ANSWER,)), (left, right))
    both = left.candidates & right.candidates
    return _Node(lo, bits, both or left.candidates | right.candidates, (left, right))


def _emit(node: _Node, inherited: PortAnswer) -> Iterator[Block]:
    answer = inherited
    if inherited not in node.candidates:
        answer = min(node.candidates)
        yield (node.lo, node.bits, answer)
    if node.halves is not None:
        for half in node.halves:
            yield from _emit(half, answer)
