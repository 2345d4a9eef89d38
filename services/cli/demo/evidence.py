"""From a probe and the node's flow events to a row of the table.

`seen` is what the packets met; `reason` and `rule` are the node's own account of that very
connection, found by addresses, ports and protocol. A row is right only when both agree with what
was expected: a probe that merely timed out, with no drop on record, is not a drop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.cli.demo.scenario import Probe, Seen
from services.cli.demo.traffic import Sent
from services.flows.flow import Flow

NO_EVENT = "the node reported no such flow"


@dataclass(frozen=True, slots=True)
class Shot:
    """A probe as sent, and where to."""

    probe: Probe
    sent: Sent
    target_ip: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    probe: Probe
    seen: Seen
    reason: str
    rule: str
    right: bool

    def to_dict(self) -> dict[str, str | int]:
        return {
            "from": self.probe.source,
            "to": self.probe.target,
            "port": self.probe.port,
            "proto": self.probe.proto,
            "expected": self.probe.expected.value,
            "seen": self.seen.value,
            "reason": self.reason,
            "rule": self.rule,
        }


def explained(shot: Shot, flows: Sequence[Flow]) -> bool:
    """Whether `flows` already tell why the probe met what it met."""
    verdicts = {flow.verdict for flow in of(shot, flows)}
    if shot.sent.seen is Seen.DROPPED:
        return "DROPPED" in verdicts
    return "FORWARDED" in verdicts


def of(shot: Shot, flows: Sequence[Flow]) -> list[Flow]:
    return [flow for flow in flows if _belongs(shot, flow)]


def _belongs(shot: Shot, flow: Flow) -> bool:
    return (
        flow.proto == shot.probe.proto
        and flow.source.ip == shot.sent.source_ip
        and flow.destination.ip == shot.target_ip
        and (flow.source.port == shot.sent.source_port or not shot.probe.port)
        and flow.destination.port == shot.probe.port
    )


def row(shot: Shot, flows: Sequence[Flow]) -> Row:
    mine = of(shot, flows)
    seen = shot.sent.seen
    drops = [flow for flow in mine if flow.verdict == "DROPPED"]
    passes = [flow for flow in mine if flow.verdict == "FORWARDED"]
    if seen is Seen.DROPPED and drops:
        reason, rule = _of_drop(drops[-1])
    elif seen is not Seen.DROPPED and passes:
        reason, rule = _of_pass(passes)
    else:
        told = sorted({f"{flow.direction} {flow.verdict}" for flow in mine})
        reason, rule = f"{NO_EVENT}; it has {', '.join(told) or 'none'}", ""
    right = seen is shot.probe.expected and bool(rule)
    note = f" ({shot.note})" if shot.note else ""
    return Row(shot.probe, seen, reason + note, rule, right)


def _of_drop(flow: Flow) -> tuple[str, str]:
    return f"{flow.direction.lower()} {flow.drop_reason_desc}", flow.rule


def _of_pass(flows: Sequence[Flow]) -> tuple[str, str]:
    """Egress was judged at the source, ingress at the destination; what is no endpoint of this
    node judges nothing."""
    judged = {flow.direction: flow.rule for flow in flows}
    sides = [side for side in ("EGRESS", "INGRESS") if side in judged]
    reason = " and ".join(side.lower() for side in sides) + " allowed"
    return reason, "; ".join(dict.fromkeys(judged[side] for side in sides))
