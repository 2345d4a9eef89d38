"""Evaluation cases as JSON: what is given, what is asked, what is answered.

    Case: identities + policies + subjects with probes --evaluate--> CaseResult

Keys that are not known are skipped: recorded expectations may stand beside the questions. Null
reads as absent, as recorders of other languages write it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from services.policy.clauses import NamedPort

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
    """dns: address -> the names it was learnt for. policies: objects, or {"object": object}."""

    name: str = ""
    enforcement_mode: Literal["default", "always", "never", ""] = "default"
    dual_stack: bool = False
    allow_localhost: bool = True
    identities: tuple[CaseIdentity, ...] | None = None
    dns: dict[str, tuple[str, ...]] | None = None
    egress_named_ports: dict[str, int] | None = None
    policies: tuple[dict[str, object], ...] | None = None
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


class CaseResult(msgspec.Struct, frozen=True):
    name: str
    policies: tuple[PolicyResult, ...]
    subjects: tuple[SubjectResult, ...]


class CaseFile(msgspec.Struct, frozen=True):
    """One case each; they are decoded one by one, so that a large file is not held as objects."""

    cases: tuple[msgspec.Raw, ...] | None = None


def port_names(given: dict[str, int] | None) -> dict[NamedPort, int]:
    """Raises ValueError for a key that is not PROTOCOL/name."""
    found = {}
    for key, number in (given or {}).items():
        word, slash, name = key.partition("/")
        if not slash or word not in PROTOCOLS:
            raise ValueError(f"port name {key!r} is not written PROTOCOL/name, as in TCP/http")
        found[NamedPort(PROTOCOLS[word], name.lower())] = number
    return found
