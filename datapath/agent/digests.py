"""Digests of what a view holds (services/wire/held.py), kept as it changes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pyroaring import BitMap

from identity.numbers import NumericIdentity
from services.policy.clauses import GroupId, LocalPolicy, RuleId, RuleSource
from services.wire.held import (
    BUCKETS,
    bucket_of,
    digest_of_group,
    digest_of_policy,
    digest_of_rule,
    total,
)

if TYPE_CHECKING:
    from datapath.agent.view import Address


class ViewDigests:
    """Addresses are followed one by one, by bucket; the others, few and
    costly, are digested when they are asked for after they changed."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._addresses = [0] * BUCKETS
        self._groups: dict[GroupId, int] = {}
        self._identities: dict[NumericIdentity, int] = {}
        self._rules: int | None = None

    @property
    def addresses(self) -> tuple[int, ...]:
        return tuple(self._addresses)

    def came(self, digests: Sequence[int]) -> None:
        """Of addresses that were not there, by bucket."""
        self._addresses = [total(pair) for pair in zip(self._addresses, digests, strict=True)]

    def replaced(self, old: Address | None, new: Address | None) -> None:
        """Of one `cidr`."""
        for address, sign in ((old, -1), (new, 1)):
            if address is not None:
                where = bucket_of(address.cidr)
                self._addresses[where] = total((self._addresses[where], sign * address.digest))

    def group_changed(self, group: GroupId) -> None:
        self._groups.pop(group, None)

    def identity_changed(self, identity: NumericIdentity) -> None:
        self._identities.pop(identity, None)

    def rules_changed(self) -> None:
        self._rules = None

    def groups(self, rows: Mapping[GroupId, BitMap]) -> Mapping[GroupId, int]:
        for group in rows.keys() - self._groups.keys():
            self._groups[group] = digest_of_group(group, rows[group])
        return self._groups

    def identities(
        self, rows: Mapping[NumericIdentity, LocalPolicy]
    ) -> Mapping[NumericIdentity, int]:
        for identity in rows.keys() - self._identities.keys():
            self._identities[identity] = digest_of_policy(rows[identity])
        return self._identities

    def rules(self, rows: Mapping[RuleId, RuleSource]) -> int:
        if self._rules is None:
            self._rules = total(map(digest_of_rule, rows.values()))
        return self._rules
