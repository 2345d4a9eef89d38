"""What the numbers are spent on: identities by namespace, and values by label key.

A label whose value differs with every instance makes an identity of every instance. It is found
here: within a namespace it is the key with the most values.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from identity.labels import NAMESPACE_KEY, Labels

NO_NAMESPACE: Final = ""


@dataclass(frozen=True, slots=True)
class KeyUsage:
    """`identities` that carry the key, in `values` different values."""

    key: str
    identities: int
    values: int


class Usage:
    def __init__(self) -> None:
        self._identities: Counter[str] = Counter()
        # namespace -> key -> value -> identities
        self._values: defaultdict[str, defaultdict[str, Counter[str]]] = defaultdict(
            lambda: defaultdict(Counter)
        )

    def add(self, labels: Labels) -> None:
        namespace = namespace_of(labels)
        self._identities[namespace] += 1
        values = self._values[namespace]
        for label in labels:
            values[label.key][label.value] += 1

    def remove(self, labels: Labels) -> None:
        """`labels` must have been added."""
        namespace = namespace_of(labels)
        self._identities[namespace] -= 1
        if not self._identities[namespace]:
            del self._identities[namespace], self._values[namespace]
            return
        values = self._values[namespace]
        for label in labels:
            counter = values[label.key]
            counter[label.value] -= 1
            if not counter[label.value]:
                del counter[label.value]
            if not counter:
                del values[label.key]

    @property
    def namespaces(self) -> Mapping[str, int]:
        """Identities of each; those without a namespace count under the empty name."""
        return self._identities

    def of_keys(self, namespace: str | None = None) -> list[KeyUsage]:
        """Most values first. `namespace` None: of all of them, which costs a walk over them."""
        merged: dict[str, Counter[str]] = {}
        for name, values in self._values.items():
            if namespace in (None, name):
                for key, counter in values.items():
                    merged.setdefault(key, Counter()).update(counter)
        found = [KeyUsage(k, counter.total(), len(counter)) for k, counter in merged.items()]
        return sorted(found, key=lambda usage: (-usage.values, usage.key))

    def values_of(
        self, key: str, limit: int, namespace: str | None = None
    ) -> list[tuple[str, int]]:
        """(value, identities), the commonest first. `namespace` None: of all of them."""
        merged: Counter[str] = Counter()
        for name, values in self._values.items():
            if namespace in (None, name):
                merged.update(values.get(key, {}))
        return sorted(merged.items(), key=lambda each: (-each[1], each[0]))[:limit]

    def in_namespace(self, namespace: str) -> int:
        return self._identities.get(namespace, 0)

    def values_in(self, namespace: str) -> Mapping[str, Counter[str]]:
        """By key, how many identities of the namespace have each value."""
        return self._values.get(namespace, {})


def namespace_of(labels: Labels) -> str:
    return labels.value(NAMESPACE_KEY) or NO_NAMESPACE
