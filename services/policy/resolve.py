"""Resolution: policies and identities in, selector groups and local policies out, incrementally.

    set_policy / remove_policy ----+                +--> Changes (what to tell the nodes)
                                   +--> Resolver ---+--> group(id): members of one selector
    set_identities / remove_... ---+                +--> local_policy(identity): its clauses

Each call costs in proportion to what it changes. Members of a group never appear in a local policy,
so a new identity changes groups, not the policies of those who admit it.
"""

from __future__ import annotations

import ipaddress
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from pyroaring import BitMap

from identity.index import SelectorIndex
from identity.labels import RESERVED, Labels
from identity.numbers import HOST, NumericIdentity, reserved_labels
from identity.selector import Selector
from services.policy.cidr_groups import CidrGroup
from services.policy.clauses import GroupId, LocalPolicy, PolicyRef, RuleId, RuleSource
from services.policy.groups import GroupDef, GroupTable, definition
from services.policy.local import (
    HOST_PEER,
    Assembly,
    Enforcement,
    Naming,
    ResolvedPolicy,
    ResolvedRule,
    may_be_endpoint,
    resolve_policy,
)
from services.policy.model import CidrGroupPeer, Policy, Rule
from services.policy.prefixes import Network, PrefixTable, labels_of
from services.policy.selectors import Kind
from services.runtime.errors import NotFound

_NODES = BitMap([HOST])


@dataclass(frozen=True, slots=True)
class ResolverSettings:
    """How policies are read. `by_address`: the kinds whose CIDRs also choose endpoints and nodes.

    Other CIDRs choose addresses outside of the cluster only.
    """

    cluster: str = "default"
    allow_localhost: bool = True
    enforcement: Enforcement = "default"
    by_address: frozenset[str] = frozenset({Kind.NETWORK_POLICY, Kind.CLUSTER_NETWORK_POLICY})


@dataclass(frozen=True, slots=True)
class GroupChange:
    """Disjoint: nothing is both added and removed."""

    added: BitMap
    removed: BitMap


@dataclass(frozen=True, slots=True)
class GroupView:
    """A snapshot; later changes do not show in it."""

    id: GroupId
    selector: str
    members: BitMap


@dataclass(frozen=True, slots=True)
class Changes:
    """What one call changed.

    groups_added: groups that exist now and did not; read their members with group().
    group_deltas: of groups that existed before and still do; never empty deltas.
    locals_changed: identities to ask local_policy() for again: those a changed policy selects or
        selected, and those that were added or whose labels changed. Never removed ones.
    prefixes_*: node-local identities of the CIDRs policies name, keyed by canonical prefix.
    """

    groups_added: tuple[GroupId, ...] = ()
    groups_removed: tuple[GroupId, ...] = ()
    group_deltas: Mapping[GroupId, GroupChange] = field(default_factory=dict)
    locals_changed: BitMap = field(default_factory=BitMap)
    prefixes_added: Mapping[str, NumericIdentity] = field(default_factory=dict)
    prefixes_removed: Mapping[str, NumericIdentity] = field(default_factory=dict)
    rules_added: tuple[RuleSource, ...] = ()
    rules_removed: tuple[RuleId, ...] = ()


def rule_count(policy: Policy) -> int:
    """How many consecutive rule ids the policy takes: one per clause."""
    return sum(len(rule.clauses) for rule in policy.rules)


def _refers_to_cidr_groups(policy: Policy) -> bool:
    clauses = (clause for rule in policy.rules for clause in rule.clauses)
    return any(isinstance(peer, CidrGroupPeer) for c in clauses for peer in c.peers or ())


class _Recorder:
    """Notes what a call does to groups, prefixes and locals; nothing is noted twice."""

    def __init__(self) -> None:
        self.groups_added: dict[GroupId, None] = {}
        self.groups_removed: dict[GroupId, None] = {}
        self.locals = BitMap()
        self.prefixes_added: dict[str, NumericIdentity] = {}
        self.prefixes_removed: dict[str, NumericIdentity] = {}

    def changes(
        self,
        groups: GroupTable,
        was: tuple[RuleSource, ...] = (),
        now: tuple[RuleSource, ...] = (),
    ) -> Changes:
        deltas = groups.take_deltas()
        old, kept = set(was), {source.rule_id for source in now}
        return Changes(
            tuple(self.groups_added),
            tuple(self.groups_removed),
            {
                group: GroupChange(delta.added, delta.removed)
                for group, delta in deltas.items()
                if group not in self.groups_added
            },
            self.locals,
            self.prefixes_added,
            self.prefixes_removed,
            tuple(source for source in now if source not in old) if was else now,
            tuple(source.rule_id for source in was if source.rule_id not in kept),
        )


class Resolver:
    """Knows the reserved identities from the start; policies and other identities are fed in.

    With allow_localhost the group of the local host exists from the start, too, and never goes:
    no Changes announce it.
    """

    def __init__(self, settings: ResolverSettings) -> None:
        self.settings = settings
        self._index = SelectorIndex()
        self._index.add_identities(reserved_labels())
        self._prefixes = PrefixTable()
        self._held: defaultdict[NumericIdentity, set[Network]] = defaultdict(set)
        self._groups = GroupTable(self._index, self._prefixes)
        self._policies: dict[PolicyRef, ResolvedPolicy] = {}
        self._cidr_groups: dict[str, CidrGroup] = {}
        self._rules: dict[RuleId, RuleSource] = {}
        # Subject selector -> the rules that have it, by policy.
        self._subjects: dict[Selector, dict[PolicyRef, tuple[ResolvedRule, ...]]] = {}
        self._no_endpoints = BitMap(n for n in reserved_labels() if not may_be_endpoint(n))
        self._locals: dict[NumericIdentity, LocalPolicy] = {}
        self._assembled: dict[tuple[frozenset[Selector], bool, bool, bool], LocalPolicy] = {}
        host = definition(HOST_PEER, settings.cluster) if settings.allow_localhost else None
        if host is not None:
            self._groups.acquire(host)
        self._assembly = Assembly(settings.enforcement, None if host is None else host.id)

    # -------------------------------------------------------------- policies

    def set_policy(self, policy: Policy, rule_base: RuleId) -> Changes:
        """Add or replace by ref. The n-th clause, in the order of Rule.clauses, has rule_base + n.

        The same policy with the same rule_base again changes nothing.
        """
        was = self._policies.get(policy.ref)
        if was is not None and was.policy == policy and was.rule_base == rule_base:
            return Changes()
        record = _Recorder()
        now = resolve_policy(policy, rule_base, self._naming(policy))
        # New uses before old ones end: what both share stays.
        self._acquire(now, record)
        if was is not None:
            self._release(was, record)
        self._enter(now, record)
        return self._finish(record, was, now)

    def set_cidr_groups(self, groups: Iterable[CidrGroup]) -> Changes:
        """All that exist from now on; policies that refer to one are resolved anew."""
        self._cidr_groups = {group.name: group for group in groups}
        record = _Recorder()
        was = [p for p in self._policies.values() if _refers_to_cidr_groups(p.policy)]
        now = [resolve_policy(p.policy, p.rule_base, self._naming(p.policy)) for p in was]
        for each in now:
            self._acquire(each, record)
        for each in was:
            self._release(each, record)
        for each in now:
            self._enter(each, record)
        self._assembled.clear()
        self._forget_locals(record.locals)
        return record.changes(self._groups)

    def _naming(self, policy: Policy) -> Naming:
        settings = self.settings
        by_address = policy.ref.kind in settings.by_address
        return Naming(settings.cluster, by_address, self._cidr_groups)

    def remove_policy(self, ref: PolicyRef) -> Changes:
        """No change when there is no such policy."""
        was = self._policies.pop(ref, None)
        if was is None:
            return Changes()
        record = _Recorder()
        self._release(was, record)
        return self._finish(record, was, None)

    def _finish(
        self, record: _Recorder, was: ResolvedPolicy | None, now: ResolvedPolicy | None
    ) -> Changes:
        old = () if was is None else was.sources
        new = () if now is None else now.sources
        for source in old:
            # A rule id may meanwhile belong to another policy.
            if self._rules.get(source.rule_id) == source:
                del self._rules[source.rule_id]
        self._rules.update((source.rule_id, source) for source in new)
        self._assembled.clear()
        self._forget_locals(record.locals)
        return record.changes(self._groups, old, new)

    def _acquire(self, now: ResolvedPolicy, record: _Recorder) -> None:
        fresh = self._prefixes.acquire(now.networks)
        if fresh:
            labels = {number: labels_of(network) for network, number in fresh.items()}
            self._no_endpoints.update(labels)
            self._groups.prefixes_added(fresh)
            self._groups.selectors_changed(self._index.add_identities(labels), {})
            record.prefixes_added |= {str(network): n for network, n in fresh.items()}
        for group in now.groups:
            if self._groups.acquire(group):
                record.groups_added[group.id] = None

    def _enter(self, now: ResolvedPolicy, record: _Recorder) -> None:
        ref = now.policy.ref
        self._policies[ref] = now
        for resolved in now.rules:
            subject = resolved.rule.subject
            record.locals |= self._judged(resolved.rule, self._index.add_selector(subject))
            held = self._subjects.setdefault(subject, {})
            held[ref] = (*held.get(ref, ()), resolved)

    def _judged(self, rule: Rule, members: BitMap) -> BitMap:
        """Of the identities a subject chooses, those the rule is for."""
        return members & _NODES if rule.on_nodes else members - self._no_endpoints

    def _release(self, was: ResolvedPolicy, record: _Recorder) -> None:
        ref = was.policy.ref
        for resolved in was.rules:
            subject = resolved.rule.subject
            record.locals |= self._judged(resolved.rule, self._index.members(subject))
            self._index.remove_selector(subject)
            held = self._subjects.get(subject, {})
            held.pop(ref, None)
            if not held:
                self._subjects.pop(subject, None)
        for group in was.groups:
            if self._groups.release(group.id):
                record.groups_removed[group.id] = None
        gone = self._prefixes.release(was.networks)
        if gone:
            self._groups.prefixes_removed(gone)
            self._groups.selectors_changed({}, self._index.remove_identities(gone.values()))
            self._no_endpoints -= BitMap(gone.values())
            record.prefixes_removed |= {str(network): n for network, n in gone.items()}

    # -------------------------------------------------------------- identities

    def set_identities(self, identities: Mapping[NumericIdentity, Labels]) -> Changes:
        """Add or relabel, as one change. Reserved and CIDR identities are left alone."""
        record = _Recorder()
        fresh: dict[NumericIdentity, Labels] = {}
        for number, labels in identities.items():
            known = self._index.labels(number)
            if known == labels or self._is_fixed(number):
                continue
            record.locals.add(number)
            if known is None:
                fresh[number] = labels
            else:
                self._groups.selectors_changed(*self._index.relabel(number, labels))
        self._groups.selectors_changed(self._index.add_identities(fresh), {})
        self._no_endpoints.update(number for number in fresh if not may_be_endpoint(number))
        self._forget_locals(record.locals)
        record.locals -= self._no_endpoints
        return record.changes(self._groups)

    def remove_identities(self, identities: Iterable[NumericIdentity]) -> Changes:
        """Unknown, reserved and CIDR identities are left alone."""
        leaving = [number for number in identities if not self._is_fixed(number)]
        for number in leaving:
            self._leave(number)
        self._groups.selectors_changed({}, self._index.remove_identities(leaving))
        self._no_endpoints.difference_update(BitMap(leaving))
        self._forget_locals(BitMap(leaving))
        return _Recorder().changes(self._groups)

    def place(self, identity: NumericIdentity, prefix: str, labels: Labels) -> Changes:
        """Add or move an identity of addresses outside of the cluster that no policy names.

        CIDRs around `prefix` choose it. Of addresses that were learnt for names it carries the
        labels of the patterns (fqdn.label_of). remove_identities ends it.
        """
        network = ipaddress.ip_network(prefix)
        was = self._prefixes.unplace(identity)
        if was is not None:
            self._groups.prefixes_removed({was: identity})
        self._prefixes.place(identity, network)
        self._groups.prefixes_added({network: identity})
        changed = self._index.relabel(identity, labels)
        self._groups.selectors_changed(*changed)
        self._no_endpoints.add(identity)
        return _Recorder().changes(self._groups)

    def set_addresses(self, identity: NumericIdentity, prefixes: Iterable[str]) -> Changes:
        """Which addresses endpoints or nodes of this identity have; none forgets them.

        CIDRs that are matched by address choose the identity as a whole (see residents.py).
        """
        wanted = {ipaddress.ip_network(prefix) for prefix in prefixes}
        had = self._held.get(identity, set())
        return self.move_addresses(
            came=[(identity, network) for network in wanted - had],
            went=[(identity, network) for network in had - wanted],
        )

    def move_addresses(
        self,
        came: Iterable[tuple[NumericIdentity, Network]] = (),
        went: Iterable[tuple[NumericIdentity, Network]] = (),
    ) -> Changes:
        """Addresses that identities have from now on, and do not any more, as one change."""
        for identity, network in went:
            self._groups.address_removed(network, identity)
            held = self._held.get(identity, set())
            held.discard(network)
            if not held:
                self._held.pop(identity, None)
        for identity, network in came:
            self._held[identity].add(network)
            self._groups.address_added(network, identity)
        return _Recorder().changes(self._groups)

    def addresses_of(self, identity: NumericIdentity) -> frozenset[str]:
        """As given: which prefixes it is found at."""
        return frozenset(map(str, self._held.get(identity, ())))

    def addresses_inside(self, group: GroupId, identity: NumericIdentity) -> tuple[int, int]:
        """Of a group by address: how many of its addresses lie inside, and how many it has."""
        return self._groups.addresses_inside(group, identity)

    def _is_fixed(self, number: NumericIdentity) -> bool:
        return number in reserved_labels() or self._prefixes.holds(number)

    def _leave(self, number: NumericIdentity) -> None:
        """Prefixes and addresses that the identity had."""
        network = self._prefixes.unplace(number)
        if network is not None:
            self._groups.prefixes_removed({network: number})
        for held in self._held.pop(number, ()):
            self._groups.address_removed(held, number)

    def _forget_locals(self, numbers: BitMap) -> None:
        # Few were asked for, where a policy may select everybody.
        if len(self._locals) < len(numbers):
            stale = [number for number in self._locals if number in numbers]
        else:
            stale = [NumericIdentity(number) for number in numbers]
        for number in stale:
            self._locals.pop(number, None)

    # -------------------------------------------------------------- what follows

    def knows(self, identity: NumericIdentity) -> bool:
        return self._index.labels(identity) is not None

    def local_policy(self, identity: NumericIdentity) -> LocalPolicy:
        """What to enforce on endpoints of this identity. Raises NotFound when it is not known."""
        known = self._locals.get(identity)
        if known is not None:
            return known
        labels = self._index.labels(identity)
        if labels is None:
            raise NotFound(f"identity {identity} is not known here; was it removed?")
        chosen = frozenset(s for s in self._index.selectors_of(identity) if s in self._subjects)
        initializing = labels.get("init", RESERVED) is not None
        # Those that the same subjects select differ in their number only, unless they are reserved.
        kind = chosen, initializing, may_be_endpoint(identity), identity == HOST
        like = self._assembled.get(kind)
        if like is None:
            held = (rules for s in chosen for rules in self._subjects[s].values())
            on_nodes = identity == HOST
            rules = [one for each in held for one in each if one.rule.on_nodes is on_nodes]
            like = self._assembly.local_policy(identity, rules, initializing=initializing)
            self._assembled[kind] = like
        local = replace(like, identity=identity)
        self._locals[identity] = local
        return local

    def group(self, group: GroupId) -> GroupView:
        """Raises NotFound when no policy uses such a group."""
        if group not in self._groups:
            raise NotFound(f"group {group:#018x} is not used by any policy")
        text = self._groups.definition(group).text
        return GroupView(group, text, self._groups.members(group).copy())

    def definition(self, group: GroupId) -> GroupDef:
        """Raises KeyError when no policy uses such a group."""
        return self._groups.definition(group)

    def labels(self, identity: NumericIdentity) -> Labels | None:
        return self._index.labels(identity)

    def rules(self, ref: PolicyRef) -> tuple[RuleSource, ...]:
        """In rule id order; empty when there is no such policy."""
        held = self._policies.get(ref)
        return () if held is None else held.sources

    def rule(self, rule_id: RuleId) -> RuleSource | None:
        return self._rules.get(rule_id)

    def prefixes(self) -> Mapping[str, NumericIdentity]:
        """Every CIDR some policy names, with its identity; the longest match of an address wins."""
        return self._prefixes.items()

    def chooses(self, selector: Selector) -> bool:
        """Whether anybody known now has what the selector asks for."""
        return bool(self._index.evaluate(selector))

    def endpoints(self, subject: Selector) -> list[NumericIdentity]:
        """The identities that policies with this subject are enforced on now."""
        return [NumericIdentity(n) for n in self._index.evaluate(subject) - self._no_endpoints]

    def selecting(self, identity: NumericIdentity) -> frozenset[PolicyRef]:
        """The policies with a rule for the identity."""
        return frozenset(
            ref
            for selector in self._index.selectors_of(identity)
            for ref in self._subjects.get(selector, ())
        )

    def selected_by(self, ref: PolicyRef) -> BitMap:
        """The identities the policy is enforced on; empty when there is no such policy."""
        held = self._policies.get(ref)
        chosen = BitMap()
        for each in () if held is None else held.rules:
            chosen |= self._judged(each.rule, self._index.members(each.rule.subject))
        return chosen
