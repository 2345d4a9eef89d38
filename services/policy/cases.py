"""Evaluation cases as JSON: what is given, what is asked, what is answered.

    Case: identities + policies + subjects with probes --evaluate--> CaseResult

Keys that are not known are skipped: recorded expectations may stand beside the questions. Null
reads as absent, as recorders of other languages write it. What was recorded with Cilium 1.17 is
read in its dialect: a file of format fuzz-1, or a case whose `source` says so.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from services.policy.clauses import NamedPort
from services.policy.features import Dialect

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPv6": 58}


class CaseIdentity(msgspec.Struct, frozen=True):
    """prefix: of addresses outside of the cluster. addresses: of an endpoint or node."""

    id: int
    labels: tuple[str, ...] | None = None
    prefix: str | None = None
    addresses: tuple[str, ...] | None = None


class CaseSubject(msgspec.Struct, frozen=True):
    """named_ports: "TCP/http" -> number. A probe begins with direction, peer, protocol, port."""

    id: int
    named_ports: dict[str, int] | None = None
    probes: tuple[tuple[object, ...], ...] | None = None


class Case(msgspec.Struct, frozen=True):
    """dns: address -> the names it was learnt for. policies: objects, or {"object": object}.

    source: where it comes from, in words.
    """

    name: str = ""
    source: str | None = None
    enforcement_mode: Literal["default", "always", "never", ""] = "default"
    dual_stack: bool = False
    allow_localhost: bool = True
    identities: tuple[CaseIdentity, ...] | None = None
    dns: dict[str, tuple[str, ...] | None] | None = None
    egress_named_ports: dict[str, int] | None = None
    policies: tuple[object, ...] | None = None
    subjects: tuple[CaseSubject, ...] | None = None


class PolicyResult(msgspec.Struct, frozen=True):
    valid: bool
    error: str | None = None


class SubjectResult(msgspec.Struct, frozen=True):
    """verdicts: allow, deny, redirect or auth:<mode> for each probe; deny where `error` is set."""

    id: int
    ingress_enforced: bool
    egress_enforced: bool
    error: str | None
    verdicts: tuple[str, ...]


class CaseResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """error: what makes the case itself one that cannot be judged; absent otherwise."""

    name: str
    policies: tuple[PolicyResult, ...]
    subjects: tuple[SubjectResult, ...]
    error: str | None = None


class CaseFile(msgspec.Struct, frozen=True):
    """One case each; they are decoded one by one, so that a large file is not held as objects."""

    cases: tuple[msgspec.Raw, ...] | None = None
    format: str | None = None


RECORDED_FORMAT = "fuzz-1"
_RECORDED = re.compile(r"cilium\b.*\b1\.17", re.IGNORECASE)


def dialect_of(case: Case, format_: str | None) -> Dialect:
    """In whose reading the policies of a case are meant."""
    recorded = format_ == RECORDED_FORMAT or _RECORDED.search(case.source or "")
    return Dialect.CILIUM_1_17 if recorded else Dialect.TESSERA


def port_names(given: dict[str, int] | None) -> dict[NamedPort, int]:
    """Raises ValueError for a key that is not PROTOCOL/name."""
    found = {}
    for key, number in (given or {}).items():
        word, slash, name = key.partition("/")
        if not slash or word not in PROTOCOLS:
            raise ValueError(f"port name {key!r} is not written PROTOCOL/name, as in TCP/http")
        found[NamedPort(PROTOCOLS[word], name.lower())] = number
    return found
