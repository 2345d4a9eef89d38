"""What the numbers of an event mean: endpoints by name, rules by policy and line.

Asked when events are drained, a few hundredths of a second after the packet, because numbers
outlive what they stand for: a flow tells of the policy and the endpoints of its time, whatever is
deleted later. Of a drain's records each kind is explained once (grouping.py), however many there
are of it; the texts are made once per rule, endpoint and direction as long as view and endpoints
stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from sys import intern
from typing import Literal, NamedTuple, overload

from datapath.agent.grouping import Kinds, kinds
from datapath.agent.record import EndpointRecord, State
from datapath.agent.view import View
from datapath.maps.layout import Event, EventType, Verdict, plain
from datapath.maps.ring import Records
from identity.numbers import HOST, NumericIdentity
from services.flows.flow import (
    Flow,
    Judge,
    Party,
    drop_reason_text,
    protocol_name,
    tcp_flags_text,
)
from services.policy.clauses import (
    RULE_ALLOW_LOCALHOST,
    RULE_CONTROL_CHANNEL,
    RULE_DEFAULT_ALLOW,
    RULE_DEFAULT_DENY,
    RULE_NONE,
    RULE_OPEN,
    PolicyRef,
    RuleId,
)

# Names kept for quick reuse; somebody who forges sources must not fill the memory with them.
_PARTIES_KEPT = 65536

_ICMP = (1, 58)
_INGRESS = 1
_POLICY_DENIED = 133
_WORDS: dict[RuleId, str] = {
    RULE_OPEN: "no policy selects the endpoint",
    RULE_ALLOW_LOCALHOST: "the node reaches its own endpoints",
    RULE_CONTROL_CHANNEL: "the control channel, never stopped",
    RULE_DEFAULT_ALLOW: "policies select the endpoint, all without default deny",
}


class Name(NamedTuple):
    namespace: str
    name: str


class Explained(NamedTuple):
    """`judge`: the endpoint whose policy gave the verdict."""

    event: Event
    rule: str
    judge: Name
    source: Name
    destination: Name


NOBODY = Name("", "")
# The judge of what the node itself sends and gets.
_THE_NODE = EndpointRecord(0, "", "host", (), "", "", "", State.READY, identity=HOST)


class Explanation(NamedTuple):
    rule: str
    judge: Name
    source: Name
    destination: Name


class ExplainedRecords(Sequence[Explained]):
    """One drain, told in the words of its moment: the records as they lay in the ring, and an
    explanation for each kind of them."""

    def __init__(self, kinds: Kinds, explanations: Sequence[Explanation]) -> None:
        self._kinds = kinds
        self._explanations = explanations

    def __len__(self) -> int:
        return len(self._kinds.flows)

    @overload
    def __getitem__(self, at: int) -> Explained: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Explained]: ...
    def __getitem__(self, at: int | slice) -> Explained | Sequence[Explained]:
        if isinstance(at, slice):
            return [self[one] for one in range(len(self))[at]]
        return Explained(self._kinds.flows[at], *self._explanations[self._kinds.of[at]])


class Explainer:
    def __init__(self, view: View, records: Callable[[], Iterable[EndpointRecord]]) -> None:
        self._view = view
        self._records = records
        self._names = Names(view, ())

    def explain(self, drained: Records) -> ExplainedRecords:
        """The flows among them, in the words of this moment."""
        endpoints = tuple(self._records())
        if not self._names.stand(endpoints):
            self._names = Names(self._view, endpoints)
        found = kinds(drained)
        return ExplainedRecords(
            found, self._names.explained(found.flows[first] for first in found.first)
        )


class Names:
    """Of one state of view and endpoints."""

    def __init__(self, view: View, records: tuple[EndpointRecord, ...]) -> None:
        self._view = view
        self._generation = view.generation
        self._records = records
        self._by_id = {record.id: record for record in (*records, _THE_NODE)}
        self._by_address = {ip: record for record in records for ip in record.ips}
        self._parties: dict[bytes, Name] = {}
        self._rules: dict[tuple[int, int, int, bool], tuple[str, Name]] = {}

    def stand(self, records: tuple[EndpointRecord, ...]) -> bool:
        """Comparing thousands of records is comparing as many pointers."""
        return self._generation == self._view.generation and self._records == records

    def explained(self, events: Iterable[Event]) -> list[Explanation]:
        if len(self._parties) > _PARTIES_KEPT:
            self._parties.clear()
        parties, rules = self._parties, self._rules
        found = []
        for event in events:
            by_policy = event.type != EventType.DROP or event.reason == _POLICY_DENIED
            judged = (event.rule_id, event.endpoint, event.direction, by_policy)
            rule, judge = rules.get(judged) or self._judged(judged)
            source = parties.get(event.saddr) or self._party(event.saddr)
            destination = parties.get(event.daddr) or self._party(event.daddr)
            found.append(Explanation(rule, judge, source, destination))
        return found

    def _party(self, packed: bytes) -> Name:
        address = str(plain(int.from_bytes(packed, "big")))
        who = self._by_address.get(address) or self._view.addresses.get(address)
        found = self._parties[packed] = Name(who.namespace, who.name) if who else NOBODY
        return found

    def _judged(self, key: tuple[int, int, int, bool]) -> tuple[str, Name]:
        rule_id, endpoint, direction, by_policy = key
        judge = self._by_id.get(endpoint)
        rule = self._rule(rule_id, judge, by_policy=by_policy, ingress=direction == _INGRESS)
        name = Name(judge.namespace, judge.name) if judge else NOBODY
        found = self._rules[key] = (intern(rule), name)
        return found

    def _rule(
        self, number: int, judge: EndpointRecord | None, *, by_policy: bool, ingress: bool
    ) -> str:
        rule_id = RuleId(number)
        source = self._view.rule(rule_id)
        if source is not None:
            return str(source)
        if not by_policy:
            return ""
        if rule_id in (RULE_NONE, RULE_DEFAULT_DENY):
            return self._default_deny(judge, ingress=ingress)
        return _WORDS.get(rule_id, f"rule {rule_id}, no longer known")

    def _default_deny(self, judge: EndpointRecord | None, *, ingress: bool) -> str:
        policy = self._view.locals.get(judge.identity if judge else NumericIdentity(0))
        refs: tuple[PolicyRef, ...] = ()
        if policy is not None:
            refs = policy.ingress_policies if ingress else policy.egress_policies
        if not refs:
            return "default deny"
        return f"default deny: selected by {', '.join(map(str, refs))}"


def flow_of(explained: Explained, wall_offset_s: float, node: str) -> Flow:
    """`wall_offset_s`: wall clock minus the clock that events are stamped with."""
    event = explained.event
    icmp = event.proto in _ICMP
    ingress = event.direction == _INGRESS
    seen_s = event.time_ns / 1e9 + wall_offset_s
    sport, dport = (0, 0) if icmp else (event.sport, event.dport)
    return Flow(
        time=datetime.fromtimestamp(seen_s, UTC).isoformat().replace("+00:00", "Z"),
        verdict="DROPPED" if event.type == EventType.DROP else _verdict(event.verdict),
        direction="INGRESS" if ingress else "EGRESS",
        source=Party(str(event.source), sport, event.src_identity, *explained.source),
        destination=Party(
            str(event.destination), dport, event.dst_identity, *explained.destination
        ),
        proto=protocol_name(event.proto),
        tcp_flags=tcp_flags_text(event.tcp_flags),
        drop_reason=event.reason,
        drop_reason_desc=drop_reason_text(event.reason),
        rule_id=event.rule_id,
        rule=explained.rule,
        endpoint=Judge(
            event.endpoint,
            event.dst_identity if ingress else event.src_identity,
            *explained.judge,
        ),
        icmp_type=event.sport if icmp else 0,
        icmp_code=event.dport if icmp else 0,
        length=event.length,
        node=node,
    )


def _verdict(verdict: int) -> Literal["FORWARDED", "REDIRECTED"]:
    return "REDIRECTED" if verdict == Verdict.REDIRECT else "FORWARDED"
