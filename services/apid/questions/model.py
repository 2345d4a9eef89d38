"""Questions about policy and their answers, as REST takes and shows them."""

from __future__ import annotations

from msgspec import Struct

from services.apid.policies.model import PolicyProblem, Ref


class Rule(Struct, frozen=True):
    """A clause of a policy. `rule`: which of its specs. `clause`: as in ingress[0]. `log`: what the
    policy wants said with its verdicts."""

    kind: str
    namespace: str
    name: str
    rule: int
    clause: str
    line: int
    log: str = ""


class Miss(Struct, frozen=True):
    """What the connection lacks to be let in by `rule`."""

    lacks: str
    rule: Rule


class End(Struct, frozen=True):
    """One end of the connection. `verdict`: allow, deny, redirect or auth:<mode>. `rules`: without
    all of them it would be another. `policies`: those that restrict the direction."""

    direction: str
    identity: int
    peer: int
    verdict: str
    reason: str
    rules: tuple[Rule, ...]
    policies: tuple[Ref, ...]
    misses: tuple[Miss, ...]


class Explained(Struct, frozen=True):
    """`ends`: egress of the source, ingress of the target, as far as they are endpoints."""

    source: str
    target: str
    port: str
    verdict: str
    ends: tuple[End, ...]
    revision: int


class Connection(Struct, frozen=True, forbid_unknown_fields=True):
    """`source`, `target`: namespace/name, an address, an identity or a reserved name such as world.
    `port`: 8080/TCP, 53/UDP or 8/ICMP."""

    source: str
    target: str
    port: str


class Manifests(Struct, frozen=True, forbid_unknown_fields=True):
    """One or many documents, YAML or JSON. `source`: what to call them in messages."""

    text: str
    source: str = "request body"


class Candidates(Struct, frozen=True, forbid_unknown_fields=True):
    """`manifests`: policies that would be added, or put in place of what has their names.
    `deleted`: what would go. `ports`: asked of every pair of identities in use."""

    manifests: tuple[Manifests, ...] = ()
    deleted: tuple[Ref, ...] = ()
    connections: tuple[Connection, ...] = ()
    ports: tuple[str, ...] = ()
    namespace: str = "default"


class Change(Struct, frozen=True):
    source: str
    target: str
    port: str
    before: str
    after: str
    reason: str


class Difference(Struct, frozen=True):
    """At most 1,000 of each list; the counts tell all. `changed`: let in before and after, but with
    or without a proxy or a handshake."""

    denied: tuple[Change, ...]
    allowed: tuple[Change, ...]
    changed: tuple[Change, ...]
    denied_count: int
    allowed_count: int
    changed_count: int
    unchanged: int
    problems: tuple[PolicyProblem, ...]
    revision: int
