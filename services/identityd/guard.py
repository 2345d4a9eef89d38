"""Keeps one namespace from using up the numbers of all.

Counted are identities the view knows and those this process is creating; replicas do not see each
other's creations at once, so a quota may be passed by what is under way.
"""

from __future__ import annotations

from collections.abc import Callable

from identity.labels import Labels
from services.identityd.rules import LabelRules
from services.identityd.usage import KeyUsage, Usage, namespace_of
from services.runtime.errors import Exhausted
from services.runtime.log import logger

log = logger(__name__)


class Guard:
    """`usage`: asked anew each time, since a view that starts over counts anew."""

    def __init__(
        self,
        usage: Callable[[], Usage],
        under_way: Callable[[str], int],
        rules: Callable[[], LabelRules],
    ) -> None:
        self._usage = usage
        self._under_way = under_way
        self._rules = rules
        self._told: set[tuple[str, str]] = set()

    @property
    def warned(self) -> int:
        """Label keys, by namespace, that were found to have too many values."""
        return len(self._told)

    def refusal(self, labels: Labels) -> Exhausted | None:
        """Why no new identity is made of `labels`; those that exist are not affected."""
        quota, namespace = self._rules().namespace_quota, namespace_of(labels)
        if not (quota and namespace):
            return None
        usage = self._usage()
        used = usage.in_namespace(namespace) + self._under_way(namespace)
        if used < quota:
            return None
        return Exhausted(
            f"namespace {namespace!r} has {used} identities and may have {quota}"
            f" (namespace_quota); {_suggestion(usage.of_keys(namespace))}, or raise the quota"
        )

    def created(self, labels: Labels) -> None:
        """Tells once of a key whose values multiply."""
        namespace = namespace_of(labels)
        by_key = self._usage().values_in(namespace)
        threshold = self._rules().warn_values
        for label in labels:
            values = len(by_key.get(label.key, ()))
            if values >= threshold:
                self._tell(namespace, label.key, values)
            elif self._told and values < threshold // 2:
                self._told.discard((namespace, label.key))

    def _tell(self, namespace: str, key: str, values: int) -> None:
        if (namespace, key) in self._told:
            return
        self._told.add((namespace, key))
        log.warning(
            "identity.cardinality",
            namespace=namespace,
            key=key,
            count=values,
            suggestion=_suggestion([KeyUsage(key, values, values)]),
        )


def _suggestion(usages: list[KeyUsage]) -> str:
    if not usages or usages[0].values < 2:
        return "stop workloads that are not needed"
    worst = usages[0]
    pattern = worst.key.replace(".", r"\.")
    return (
        f"label {worst.key!r} alone has {worst.values} values there: if no policy needs it, have it"
        f" ignored (label filter '!{pattern}$')"
    )
