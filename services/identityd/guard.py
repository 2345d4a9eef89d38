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
        usage, namespace = self._usage(), namespace_of(labels)
        threshold = self._rules().warn_values
        for label in labels:
            at = (namespace, label.key)
            values = usage.distinct(*at)
            if values >= threshold and at not in self._told:
                self._told.add(at)
                found = [KeyUsage(label.key, values, values)]
                log.warning(
                    "identity.cardinality",
                    namespace=namespace,
                    key=label.key,
                    count=values,
                    suggestion=_suggestion(found),
                )
            elif values < threshold // 2:
                self._told.discard(at)


def _suggestion(usages: list[KeyUsage]) -> str:
    if not usages or usages[0].values < 2:
        return "stop workloads that are not needed"
    worst = usages[0]
    pattern = worst.key.replace(".", r"\.")
    return (
        f"label {worst.key!r} alone has {worst.values} values there: if no policy needs it, have it"
        f" ignored (label filter '!{pattern}$')"
    )
