"""Decisions that need more than deny before allow: L7 rules, authentication, ordered tiers.

    ADMIN (first match) --pass/none--> NETWORK_POLICY (deny, redirect, allow; final if isolated)
                                          --not isolated--> BASELINE (first match)

Authentication: of the clauses that match, the most specific one that speaks of it decides; ports
weigh more than the peer, as the lookup of a policy map has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from services.policy.blocks import LAST_PORT, NO_ANSWER, PORT_BITS, PortAnswer, Step, Verdict
from services.policy.clauses import RULE_DEFAULT_DENY, RULE_OPEN, Action, Clause, Tier
from services.policy.l7 import Auth, merge

OPEN: Final = PortAnswer(Verdict.ALLOW, RULE_OPEN)
# Where a row must deny explicitly what no clause allows, because wider rows allow it.
DEFAULT_DENY: Final = PortAnswer(Verdict.DENY, RULE_DEFAULT_DENY)

_VERDICTS: Final = {Action.ALLOW: Verdict.ALLOW, Action.DENY: Verdict.DENY}


@dataclass(frozen=True, slots=True)
class Claim:
    """A clause's say on the ports lo..hi of one protocol; `anywhere`: of every protocol."""

    lo: int
    hi: int
    clause: Clause
    anywhere: bool = False

    @property
    def port_bits(self) -> int:
        """How specific the ports are: none, a protocol alone, then by the bits of the block."""
        return -1 if self.anywhere else PORT_BITS - (self.hi - self.lo).bit_length()

    @property
    def peer_specific(self) -> bool:
        return bool(self.clause.groups)


def is_plain(clause: Clause) -> bool:
    """Nothing but deny before allow."""
    plain_tier = clause.tier is Tier.NETWORK_POLICY
    return plain_tier and clause.proxy is None and not clause.auth


def ranked_steps(claims: Sequence[Claim], *, isolated: bool) -> list[Step]:
    """The answer from each listed port up to the next one; the first is port 0."""
    if any(claim.clause.auth is not None for claim in claims):
        claims = [piece for claim in claims for piece in _aligned(claim)]
    edges = {0} | {c.lo for c in claims} | {c.hi + 1 for c in claims if c.hi < LAST_PORT}
    found: list[Step] = []
    for port in sorted(edges):
        here = [claim for claim in claims if claim.lo <= port <= claim.hi]
        answer = decide_ranked(here, isolated=isolated)
        if not found or found[-1][1] != answer:
            found.append((port, answer))
    return found


def decide_ranked(claims: Iterable[Claim], *, isolated: bool) -> PortAnswer:
    """All claims are about the packet in question."""
    held = sorted(claims, key=lambda claim: (claim.clause.order, claim.clause.rule_id))
    for tier in Tier:
        own = [claim for claim in held if claim.clause.tier is tier]
        if tier is Tier.NETWORK_POLICY:
            answer = _four_lines(own)
            if isolated or answer != NO_ANSWER:
                return answer
        elif own and own[0].clause.action is not Action.PASS:
            first = own[0].clause
            return PortAnswer(_VERDICTS[first.action], first.rule_id)
    return OPEN


def _four_lines(claims: Sequence[Claim]) -> PortAnswer:
    denies = [c.clause.rule_id for c in claims if c.clause.action is Action.DENY]
    if denies:
        return PortAnswer(Verdict.DENY, min(denies))
    if not claims:
        return NO_ANSWER
    proxied = [c.clause.rule_id for c in claims if c.clause.proxy is not None]
    rules = proxied or [c.clause.rule_id for c in claims]
    verdict = Verdict.REDIRECT if proxied else Verdict.ALLOW
    return PortAnswer(verdict, min(rules), merge(c.clause.proxy for c in claims), _auth(claims))


def _auth(claims: Sequence[Claim]) -> Auth:
    speaking = (
        (claim.port_bits, claim.peer_specific, claim.clause.auth)
        for claim in claims
        if claim.clause.auth is not None
    )
    return max(speaking, default=(0, False, Auth.DISABLED))[2]


def _aligned(claim: Claim) -> Iterator[Claim]:
    """The range in the fewest aligned blocks."""
    lo = claim.lo
    while lo <= claim.hi:
        size = lo & -lo or LAST_PORT + 1
        while lo + size - 1 > claim.hi:
            size >>= 1
        yield Claim(lo, lo + size - 1, claim.clause, claim.anywhere)
        lo += size
