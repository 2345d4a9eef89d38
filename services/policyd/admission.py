"""What a policy would do to the nodes, asked before it is stored.

    policies --tried in the resolver, and taken back--> objections, with the numbers
        rows      a node's policy_peer map would overflow
        parsers   clauses that meet on an endpoint cannot be enforced together (conflicts.py)
        control   the nodes would be cut off from what `[policyd] protected` names

The trial is one step of the loop, so nobody sees it: what it changes is changed back before
anything else runs, and no change-set is made of it. Objections are about what the request makes
worse: what is wrong already does not keep anybody from mending something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from pyroaring import BitMap

from identity.labels import Invalid as InvalidLabels
from identity.numbers import HOST, REMOTE_NODE, NumericIdentity
from identity.selector import Selector
from services.policy.clauses import Direction, LocalPolicy, RuleId
from services.policy.compile import Verdict
from services.policy.conflicts import conflict
from services.policy.explain import Asked, answer_of
from services.policy.parse import ParsedPolicy, Problem
from services.policyd.state import State
from services.runtime.errors import Invalid

# Rule ids that no stored policy has; what is tried is never sent.
_TRIAL_RULES: Final = RuleId(1 << 31)
# Of a policy that selects more identities this many are looked at: the same clauses meet on most.
_LOOKED_AT: Final = 256
# A policy that adds less than this share of a map is not what fills it.
_SMALL: Final = 0.02
_PROTOCOLS: Final = {"TCP": 6, "UDP": 17, "SCTP": 132}


@dataclass(frozen=True, slots=True)
class Protected:
    """What every node must be able to reach: endpoints by their labels, one port."""

    selector: Selector
    proto: int
    port: int
    text: str

    @classmethod
    def parse(cls, text: str) -> Protected:
        """Of "app=etcd 2379/TCP". Raises `Invalid`."""
        labels, _, where = text.strip().rpartition(" ")
        number, _, protocol = where.partition("/")
        proto = _PROTOCOLS.get(protocol.upper())
        if not labels or not number.isdecimal() or proto is None:
            raise Invalid(f"protected: {text!r} is not a selector and a port, as app=etcd 2379/TCP")
        try:
            return cls(Selector.parse(labels), proto, int(number), text)
        except InvalidLabels as error:
            raise Invalid(f"protected: {text!r}: {error}") from None


@dataclass(frozen=True, slots=True)
class Limits:
    """`peer_rows`: entries of the smallest policy_peer map of a node."""

    peer_rows: int
    protected: tuple[Protected, ...] = ()


@dataclass(frozen=True, slots=True)
class Harm:
    """`extent`: more is worse."""

    kind: str
    extent: int
    words: str


def objections(state: State, policies: Sequence[ParsedPolicy], limits: Limits) -> list[Problem]:
    """Errors of those that would do harm; the state is as before."""
    changed = [one for one in policies if not _is_stored(state, one)]
    if not changed:
        return []
    look = _Look(state, limits)
    with _tried(state, changed):
        refs = [one.policy.ref for one in changed]
        selected = {ref: state.resolver.selected_by(ref) for ref in refs}
        after = {ref: look.harm(chosen) for ref, chosen in selected.items()}
    return [
        Problem("error", ref, "", 0, 0, harm.words, "")
        for ref, found in after.items()
        if found
        for harm in _worse(found, look.harm(selected[ref]))
    ]


def _worse(after: Sequence[Harm], before: Sequence[Harm]) -> Iterator[Harm]:
    known = {harm.kind: harm.extent for harm in before}
    return (harm for harm in after if harm.extent > known.get(harm.kind, 0))


def _is_stored(state: State, parsed: ParsedPolicy) -> bool:
    stored = state.policies.get(parsed.policy.ref)
    return stored is not None and stored.record.manifest == parsed.manifest_text


@contextmanager
def _tried(state: State, policies: Sequence[ParsedPolicy]) -> Iterator[None]:
    """What was there goes first and comes last: so numbers of prefixes are given as they were."""
    refs = [one.policy.ref for one in policies]
    old = [state.policies[ref] for ref in refs if ref in state.policies]
    resolver = state.resolver
    try:
        for stored in old:
            resolver.remove_policy(stored.ref)
        for at, one in enumerate(policies):
            resolver.set_policy(one.policy, RuleId(_TRIAL_RULES + (at << 12)))
        yield
    finally:
        for ref in refs:
            resolver.remove_policy(ref)
        for stored in old:
            resolver.set_policy(stored.policy, stored.rule_base)


class _Look:
    """At what is enforced now on some identities."""

    def __init__(self, state: State, limits: Limits) -> None:
        self._state = state
        self._limits = limits

    def harm(self, selected: BitMap) -> list[Harm]:
        return [*self._conflicts(selected), *self._cut_off(selected), *self._overflow(selected)]

    def _conflicts(self, selected: BitMap) -> Iterator[Harm]:
        resolver = self._state.resolver
        for identity in map(NumericIdentity, selected[:_LOOKED_AT]):
            words = conflict(resolver.local_policy(identity))
            if words:
                labels = resolver.labels(identity)
                yield Harm("parsers", 1, f"{words}, on endpoints with {labels}")
                return

    def _cut_off(self, selected: BitMap) -> Iterator[Harm]:
        resolver = self._state.resolver
        for protected in self._limits.protected:
            for identity in map(NumericIdentity, selected):
                labels = resolver.labels(identity)
                if labels is None or not protected.selector.matches(labels):
                    continue
                local = resolver.local_policy(identity)
                if not all(self._admits(local, peer, protected) for peer in (HOST, REMOTE_NODE)):
                    words = (
                        f"it would cut nodes off from {protected.text}, which [policyd] protected"
                        f" names: identity {identity} would not admit host and remote-node there"
                    )
                    yield Harm(protected.text, 1, words)
                    break

    def _admits(self, local: LocalPolicy, peer: NumericIdentity, protected: Protected) -> bool:
        asked = Asked(Direction.INGRESS, local.identity, peer, protected.proto, protected.port)
        verdict = answer_of(self._state.resolver, local, asked, {}).verdict
        return verdict in (Verdict.ALLOW, Verdict.REDIRECT)

    def _overflow(self, selected: BitMap) -> Iterator[Harm]:
        """Of the node that needs the most; which nodes hold what is known from addresses."""
        addresses, limit = self._state.addresses, self._limits.peer_rows
        rows: dict[NumericIdentity, int] = {}

        def needed(identities: Iterable[NumericIdentity]) -> int:
            for identity in identities:
                if identity not in rows:
                    rows[identity] = self._rows(identity)
            return sum(rows[identity] for identity in identities)

        nodes = addresses.nodes_of(map(NumericIdentity, selected))
        concerned = [
            (needed(here), node) for node, here in nodes.items() if needed(here) > limit * _SMALL
        ]
        if not concerned:
            return
        worst, node = max((needed(addresses.identities_on(node)), node) for _, node in concerned)
        if worst > limit:
            words = (
                f"node {node} would need {worst} rows of policy_peer and has {limit}: narrow the"
                " peers, or raise [agent] policy_peer_max and [policyd] policy_peer_max"
            )
            yield Harm("rows", worst, words)

    def _rows(self, identity: NumericIdentity) -> int:
        """One for everybody else and one per peer, in each direction that is restricted."""
        resolver = self._state.resolver
        if not resolver.knows(identity):
            return 0
        local = resolver.local_policy(identity)
        total = 0
        enforced = {
            Direction.INGRESS: local.ingress_enforced,
            Direction.EGRESS: local.egress_enforced,
        }
        for direction in Direction:
            groups = {g for c in local.clauses if c.direction is direction for g in c.groups}
            if groups or enforced[direction]:
                members = [resolver.group(group).members for group in groups]
                total += 1 + (len(BitMap.union(*members)) if members else 0)
        return total
