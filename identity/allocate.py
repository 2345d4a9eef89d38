"""Which number a label set gets: decisions over cached state, to be confirmed by the store.

    wanted ──► decide(known, free, buried) ──► Refer   the set has a number: take a reference to it
                                          ├──► Create  it has none: claim this number
                                          └──► None    there is none to claim

A decision may rest on stale knowledge; the transaction that carries it out compares and fails, the
knowledge is corrected and the decision taken anew.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from pyroaring import BitMap

from identity.labels import (
    CLUSTER_KEY,
    K8S,
    RESERVED,
    Invalid,
    Label,
    Labels,
)
from identity.numbers import UNKNOWN, NumericIdentity, Scope, scope_for

# A batch of 64 sets of this size stays below what the store takes in one request.
MAX_LABELS_BYTES: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class Wanted:
    """`previous`: the number to keep if it can be had; 0 for none."""

    labels: Labels
    digest: str
    previous: NumericIdentity = UNKNOWN


@dataclass(frozen=True, slots=True)
class Refer:
    number: NumericIdentity
    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Create:
    """`tomb`: revision of the number's tombstone, which goes; 0 when it must have none."""

    number: NumericIdentity
    wanted: Wanted
    tomb: int = 0


@dataclass(frozen=True, slots=True)
class Buried:
    """A number in quarantine: the digest of the set that had it, the tombstone's revision."""

    number: NumericIdentity
    digest: str
    revision: int


class Burials(Protocol):
    def find(self, number: NumericIdentity) -> Buried | None: ...
    def take_over(self) -> Buried | None:
        """One that may be reused before its time, because there is no free number; claimed."""
        ...


class FreeNumbers:
    """The numbers of a range that are neither in the store nor claimed by a transaction under way.

    `occupy` and `vacate` follow the store; a claim ends with `occupy` or `give_back`.
    """

    def __init__(self, numbers: range, chooser: random.Random) -> None:
        self._range = numbers
        self._chooser = chooser
        self._free = BitMap(numbers)
        self._claimed: set[int] = set()

    def __len__(self) -> int:
        return len(self._free)

    @property
    def total(self) -> int:
        return len(self._range)

    def pick(self) -> NumericIdentity | None:
        """Claims one at random, so that services with the same view seldom meet."""
        if not self._free:
            return None
        number = NumericIdentity(self._free[int(self._chooser.random() * len(self._free))])
        self._claim(number)
        return number

    def claim(self, number: NumericIdentity) -> bool:
        if number not in self._free:
            return False
        self._claim(number)
        return True

    def give_back(self, number: NumericIdentity) -> None:
        """The claim came to nothing. Ignored once the store was seen to hold the number."""
        if number in self._claimed:
            self._claimed.discard(number)
            self._free.add(number)

    def occupy(self, number: NumericIdentity) -> None:
        self._claimed.discard(number)
        self._free.discard(number)

    def vacate(self, number: NumericIdentity) -> None:
        if number in self._range and number not in self._claimed:
            self._free.add(number)

    def reset(self) -> None:
        """Everything is free, claims are forgotten: the store is about to be read anew."""
        self._free = BitMap(self._range)
        self._claimed.clear()

    def _claim(self, number: NumericIdentity) -> None:
        self._free.discard(number)
        self._claimed.add(number)


def decide(
    wanted: Wanted,
    known: NumericIdentity | None,
    free: FreeNumbers,
    burials: Burials,
) -> Refer | Create | None:
    """`known`: the number the set is believed to have."""
    if known is not None:
        return Refer(known, wanted)
    previous = wanted.previous
    if previous and free.claim(previous):
        return Create(previous, wanted)
    buried = burials.find(previous) if previous else None
    if buried is not None and buried.digest == wanted.digest:
        return Create(previous, wanted, buried.revision)
    number = free.pick()
    if number is not None:
        return Create(number, wanted)
    oldest = burials.take_over()
    return None if oldest is None else Create(oldest.number, wanted, oldest.revision)


# ------------------------------------------------------------------ label sets of workloads


def workload_labels(labels: Labels, cluster: str, filtered: Callable[[Labels], Labels]) -> Labels:
    """The labels that make the identity of a workload of `cluster`.

    Raises `Invalid` for a set that the cluster does not allocate a number for.
    """
    if K8S in labels.sources():
        labels = _of_cluster(labels, cluster)
    kept = filtered(labels)
    if not kept:
        given = f"'{labels}' leaves nothing" if labels else "there is none"
        raise Invalid(
            f"no label makes an identity: {given}; give the workload a label that the label"
            " filter keeps, for example k8s:app=web"
        )
    match scope_for(kept):
        case Scope.RESERVED:
            return kept
        case Scope.LOCAL:
            raise Invalid(f"labels '{kept}' make an identity local to a node; the node numbers it")
    if RESERVED in kept.sources():
        raise Invalid(
            f"labels '{kept}' mix source 'reserved' with others; reserved labels name fixed"
            " identities, workloads cannot carry them"
        )
    size = len(kept.canonical())
    if size > MAX_LABELS_BYTES:
        raise Invalid(
            f"a label set of {size} characters is too large; at most {MAX_LABELS_BYTES} make an"
            " identity"
        )
    return kept


def _of_cluster(labels: Labels, cluster: str) -> Labels:
    claimed = labels.value(CLUSTER_KEY)
    if claimed is None:
        return labels.with_label(Label(K8S, CLUSTER_KEY, cluster))
    if claimed != cluster:
        raise Invalid(
            f"label {CLUSTER_KEY}={claimed} names another cluster than this one, {cluster!r};"
            " remove it, it is added here"
        )
    return labels
