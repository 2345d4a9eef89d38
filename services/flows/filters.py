"""Choosing flows: every given field must match; an empty filter takes everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from services.flows.flow import Flow, Party
from services.runtime.errors import Invalid


@dataclass(frozen=True, slots=True)
class FlowFilter:
    """`ip`, `port`, `identity`, `namespace`, `name` match either end."""

    verdict: str = ""
    direction: str = ""
    proto: str = ""
    ip: str = ""
    port: int = 0
    identity: int = 0
    namespace: str = ""
    name: str = ""
    drop_reason: int = 0
    rule_id: int = 0

    def matches(self, flow: Flow) -> bool:
        return self._matches_verdict(flow) and (
            self._matches_party(flow.source) or self._matches_party(flow.destination)
        )

    def _matches_verdict(self, flow: Flow) -> bool:
        return (
            (not self.verdict or flow.verdict == self.verdict)
            and (not self.direction or flow.direction == self.direction)
            and (not self.proto or flow.proto == self.proto)
            and (not self.drop_reason or flow.drop_reason == self.drop_reason)
            and (not self.rule_id or flow.rule_id == self.rule_id)
        )

    def _matches_party(self, party: Party) -> bool:
        return (
            (not self.ip or party.ip == self.ip)
            and (not self.port or party.port == self.port)
            and (not self.identity or party.identity == self.identity)
            and (not self.namespace or party.namespace == self.namespace)
            and (not self.name or party.name == self.name)
        )


_NUMBERS = {"port", "identity", "drop_reason", "rule_id"}
_UPPER = {"verdict", "direction", "proto"}
FILTER_KEYS = frozenset(f.name for f in fields(FlowFilter))


def parse_filter(query: Mapping[str, str]) -> FlowFilter:
    """From query parameters. Raises `Invalid` naming the parameter."""
    given: dict[str, str | int] = {}
    for key, text in query.items():
        if key not in FILTER_KEYS:
            raise Invalid(
                f"flow filter {key!r} is unknown; known: {', '.join(sorted(FILTER_KEYS))}"
            )
        if key in _NUMBERS:
            if not text.isdecimal():
                raise Invalid(f"flow filter {key}={text!r} is not a number")
            given[key] = int(text)
        else:
            given[key] = text.upper() if key in _UPPER else text
    return FlowFilter(**given)  # type: ignore[arg-type]  # names and kinds checked above
