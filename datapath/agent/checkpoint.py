"""What the agent keeps on disk, to work on after a restart while the control plane is away.

    <state_dir>/endpoints.ckpt   endpoints, known label sets and the session's lease; written with
                                 every change
    <state_dir>/view.ckpt        the view; written some time after it changed

A file is one msgpack value behind a header with format version and checksum, replaced as a whole
(write aside, fsync, rename, fsync the folder): a reader finds the old one or the new one. A file
that fails its checks is renamed to *.corrupt and reported. Slot and class numbers are not kept
here: the tables tell them, and cannot be out of step with themselves.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgpack
from pyroaring import BitMap

from datapath.agent.known import Remembered
from datapath.agent.record import EndpointRecord, State
from datapath.agent.view import Address, View
from identity.numbers import NumericIdentity
from services.policy.clauses import (
    Action,
    Clause,
    Direction,
    GroupId,
    LocalPolicy,
    NamedPort,
    PolicyRef,
    PortRange,
    RuleId,
    RuleSource,
    Tier,
)
from services.policy.l7 import Auth, ProxyRule
from services.runtime.errors import Exhausted
from services.runtime.log import logger

log = logger(__name__)

ENDPOINTS_FILE = "endpoints.ckpt"
VIEW_FILE = "view.ckpt"

_HEADER = struct.Struct("<4sHxxIQ")  # magic, version, crc32, length
_MAGIC = b"TSRA"
_VERSION = 4

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Journal:
    """`next_id`: endpoint ids are not used again, so that a late event names nobody else."""

    next_id: int = 1
    lease: int = 0
    endpoints: tuple[EndpointRecord, ...] = ()
    known: tuple[Remembered, ...] = ()


class Damaged(ValueError):
    """The file is not what was written."""


# ------------------------------------------------------------------ files


def write(path: Path, payload: bytes) -> None:
    """Blocks for two fsyncs. Exhausted: no room; what was there before is there still."""
    header = _HEADER.pack(_MAGIC, _VERSION, zlib.crc32(payload), len(payload))
    try:
        replace(path, header + payload)
    except OSError as error:
        raise Exhausted(
            f"cannot write {path}: {error.strerror}; make room there or mend the disk"
        ) from error


def replace(path: Path, data: bytes) -> None:
    aside = path.with_suffix(".tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path) -> bytes | None:
    """None: there is no such file. Raises `Damaged`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(data) < _HEADER.size:
        raise Damaged("it is shorter than its header")
    magic, version, checksum, length = _HEADER.unpack_from(data)
    payload = data[_HEADER.size :]
    if magic != _MAGIC:
        raise Damaged("it does not begin like a checkpoint")
    if version != _VERSION:
        raise Damaged(f"it has format {version}, this agent reads {_VERSION}")
    if len(payload) != length or zlib.crc32(payload) != checksum:
        raise Damaged("its checksum does not match")
    return payload


def load_journal(folder: Path) -> Journal | None:
    """None: none was written, or it was damaged and set aside."""
    return _load(folder / ENDPOINTS_FILE, _journal, "endpoints are taken from the kernel")


def load_view(folder: Path) -> View | None:
    return _load(folder / VIEW_FILE, _view, "what is in the kernel stays until policyd is heard")


def heard_s(folder: Path) -> float:
    """Until when the view in the folder was known to be the newest; 0: there is none."""
    try:
        return (folder / VIEW_FILE).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def still_newest(folder: Path, now_s: float) -> None:
    """Says so of the view in the folder, if there is one."""
    with suppress(FileNotFoundError):
        os.utime(folder / VIEW_FILE, (now_s, now_s))


def _load(path: Path, make: Callable[[Any], T], instead: str) -> T | None:
    try:
        payload = read(path)
        if payload is None:
            return None
        return make(msgpack.unpackb(payload, strict_map_key=False))
    except (Damaged, ValueError, LookupError, TypeError) as error:
        aside = path.with_suffix(".corrupt")
        path.replace(aside)
        why = str(error) if isinstance(error, Damaged) else f"its content is not one ({error!r})"
        log.warning(
            "checkpoint.damaged",
            file=str(path),
            reason=f"{why}; set aside as {aside.name}, {instead}",
        )
        return None


# ------------------------------------------------------------------ values


def pack_journal(journal: Journal) -> bytes:
    endpoints = [
        # msgpack has no number as large as an IPv6 address.
        {**asdict(each), "state": each.state.value, "address6": each.address6.to_bytes(16, "big")}
        for each in journal.endpoints
    ]
    known = [(each.labels, each.number, each.held_s) for each in journal.known]
    return _packed((journal.next_id, journal.lease, endpoints, known))


def _journal(value: Any) -> Journal:  # noqa: ANN401
    next_id, lease, endpoints, *later = value
    # A journal of an agent that remembered nothing.
    known = later[0] if later else ()
    return Journal(
        next_id,
        lease,
        tuple(_record(fields) for fields in endpoints),
        tuple(Remembered(tuple(labels), number, held_s) for labels, number, held_s in known),
    )


def _record(fields: dict[str, Any]) -> EndpointRecord:
    """What an older agent did not write has its default."""
    known: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    known["state"] = State(fields["state"])
    if isinstance(known.get("address6"), bytes):
        known["address6"] = int.from_bytes(known["address6"], "big")
    return EndpointRecord(**known)


def pack_view(view: View) -> bytes:
    return _packed(
        {
            "instance": view.instance,
            "revision": view.revision,
            "locals": [_plain_policy(policy) for policy in view.locals.values()],
            "groups": [(group, members.serialize()) for group, members in view.groups.items()],
            "rules": [
                (r.rule_id, _plain_ref(r.policy), r.rule_index, r.clause, r.line, r.log)
                for r in view.rules.values()
            ],
            "addresses": [
                (a.cidr, a.identity, a.node, a.namespace, a.name) for a in view.addresses.values()
            ],
        }
    )


def unpack_view(packed: bytes) -> View:
    return _view(msgpack.unpackb(packed, strict_map_key=False))


def _view(value: Any) -> View:  # noqa: ANN401
    policies = [_policy(fields) for fields in value["locals"]]
    rules = [
        RuleSource(RuleId(rule), PolicyRef(*ref), index, clause, line, log)
        for rule, ref, index, clause, line, log in value["rules"]
    ]
    addresses = [Address(*fields) for fields in value["addresses"]]
    return View(
        instance=value.get("instance", ""),
        revision=value["revision"],
        locals_={policy.identity: policy for policy in policies},
        groups={GroupId(group): BitMap.deserialize(members) for group, members in value["groups"]},
        rules={rule.rule_id: rule for rule in rules},
        addresses={address.cidr: address for address in addresses},
    )


def _plain_ref(ref: PolicyRef) -> tuple[str, str, str]:
    return (ref.kind, ref.namespace, ref.name)


def _plain_policy(policy: LocalPolicy) -> tuple[object, ...]:
    clauses = [
        (
            int(c.direction),
            c.groups,
            [(p.proto, p.lo, p.hi) for p in c.ports],
            int(c.action),
            c.rule_id,
            [(name.proto, name.name) for name in c.names],
            None if c.proxy is None else _plain_proxy(c.proxy),
            None if c.auth is None else int(c.auth),
            int(c.tier),
            c.order,
        )
        for c in policy.clauses
    ]
    refs = [list(map(_plain_ref, r)) for r in (policy.ingress_policies, policy.egress_policies)]
    enforced = (policy.ingress_enforced, policy.egress_enforced)
    return (policy.identity, *enforced, clauses, *refs)


def _plain_proxy(rule: ProxyRule) -> tuple[object, ...]:
    contexts = (rule.terminating, rule.originating, rule.listener)
    return (rule.parser, rule.rules, rule.server_names, *contexts, rule.priority)


def _clause(fields: list[Any]) -> Clause:
    direction, groups, ports, action, rule, names, proxy, auth, tier, order = fields
    return Clause(
        Direction(direction),
        tuple(groups),
        tuple(PortRange(*port) for port in ports),
        Action(action),
        RuleId(rule),
        tuple(NamedPort(*name) for name in names),
        None if proxy is None else _proxy(proxy),
        None if auth is None else Auth(auth),
        Tier(tier),
        order,
    )


def _proxy(fields: list[Any]) -> ProxyRule:
    parser, rules, server_names, *rest = fields
    return ProxyRule(parser, tuple(rules), tuple(server_names), *rest)


def _policy(fields: list[Any]) -> LocalPolicy:
    identity, ingress, egress, clauses, ingress_refs, egress_refs = fields
    return LocalPolicy(
        NumericIdentity(identity),
        ingress,
        egress,
        tuple(map(_clause, clauses)),
        _refs(ingress_refs),
        _refs(egress_refs),
    )


def _refs(values: Iterable[list[str]]) -> tuple[PolicyRef, ...]:
    return tuple(PolicyRef(*value) for value in values)


def _packed(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed
