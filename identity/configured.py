"""Identities that follow from configuration and are stored nowhere: well-known and fixed ones.

Well-known numbers (100 to 115) belong to system workloads of Kubernetes clusters, so that DNS and
the control plane get their identity while nothing can allocate one. Fixed numbers (128 to 255) are
an operator's choice: a workload that carries `io.cilium.fixed-identity=NAME` gets the number that
the configuration gives NAME, whatever its other labels, and is selected as reserved:NAME.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, final

from identity.labels import (
    CLUSTER_KEY,
    K8S,
    NAMESPACE_KEY,
    NAMESPACE_LABELS_PREFIX,
    RESERVED,
    SERVICE_ACCOUNT_KEY,
    Invalid,
    Label,
    Labels,
)
from identity.numbers import (
    FIRST_ALLOCATED,
    FIRST_FIXED,
    FIRST_WELL_KNOWN,
    NumericIdentity,
    reserved_number,
)

FIXED_KEY: Final = "io.cilium.fixed-identity"

_SYSTEM_NAMESPACE: Final = "kube-system"
_NAMESPACE_NAME_KEY: Final = f"{NAMESPACE_LABELS_PREFIX}kubernetes.io/metadata.name"
# In the order of their numbers: service account, and the labels beside it.
_WELL_KNOWN: Final[tuple[tuple[str, Mapping[str, str]], ...]] = (
    ("cilium-etcd-sa", {"io.cilium/app": "etcd-operator"}),
    (
        "default",
        {"app": "etcd", "etcd_cluster": "cilium-etcd", "io.cilium/app": "etcd-operator"},
    ),
    ("kube-dns", {"k8s-app": "kube-dns"}),
    ("kube-dns", {"k8s-app": "kube-dns", "eks.amazonaws.com/component": "kube-dns"}),
    ("coredns", {"k8s-app": "kube-dns"}),
    (
        "cilium-operator",
        {
            "name": "cilium-operator",
            "io.cilium/app": "operator",
            "app.kubernetes.io/part-of": "cilium",
            "app.kubernetes.io/name": "cilium-operator",
        },
    ),
    ("coredns", {"k8s-app": "kube-dns", "eks.amazonaws.com/component": "coredns"}),
    (
        "cilium-etcd-operator",
        {"name": "cilium-etcd-operator", "io.cilium/app": "etcd-operator"},
    ),
)


@final
class ConfiguredIdentities:
    """`fixed`: "128=kv-store", a number and the name that stands for it."""

    def __init__(self, cluster: str, fixed: Iterable[str] = ()) -> None:
        """Raises `Invalid` for what `fixed` cannot mean."""
        well_known = _well_known(cluster)
        self._by_labels = {labels: number for number, labels in well_known.items()}
        self._by_name = _fixed(fixed)
        named = {n: Labels([Label(RESERVED, name, "")]) for name, n in self._by_name.items()}
        self.labels: Mapping[NumericIdentity, Labels] = {**well_known, **named}

    def number_of(self, labels: Labels) -> NumericIdentity | None:
        """A reserved or a well-known number."""
        reserved = reserved_number(labels)
        return self._by_labels.get(labels) if reserved is None else reserved

    def fixed_number(self, labels: Labels) -> NumericIdentity | None:
        """None without the label. Raises `Invalid` for a name that is not configured: falling back
        to another number would quietly give the workload other rights than were asked for."""
        name = labels.value(FIXED_KEY)
        if name is None:
            return None
        number = self._by_name.get(name)
        if number is None:
            known = ", ".join(sorted(self._by_name)) or "none"
            raise Invalid(
                f"label {FIXED_KEY}={name} names no fixed identity; configured: {known}; add"
                f' "{FIRST_FIXED}={name}" to identityd.fixed_identities, or remove the label'
            )
        return number


def _well_known(cluster: str) -> dict[NumericIdentity, Labels]:
    found: dict[NumericIdentity, Labels] = {}
    twin = len(_WELL_KNOWN)
    for at, (account, others) in enumerate(_WELL_KNOWN):
        plain = {
            NAMESPACE_KEY: _SYSTEM_NAMESPACE,
            SERVICE_ACCOUNT_KEY: account,
            CLUSTER_KEY: cluster,
            **others,
        }
        named = {**plain, _NAMESPACE_NAME_KEY: _SYSTEM_NAMESPACE}
        found[NumericIdentity(FIRST_WELL_KNOWN + at)] = _of_k8s(plain)
        found[NumericIdentity(FIRST_WELL_KNOWN + twin + at)] = _of_k8s(named)
    return found


def _of_k8s(values: Mapping[str, str]) -> Labels:
    return Labels(Label(K8S, key, value) for key, value in values.items())


def _fixed(texts: Iterable[str]) -> dict[str, NumericIdentity]:
    by_name: dict[str, NumericIdentity] = {}
    for text in texts:
        digits, _, name = text.partition("=")
        in_range = digits.isascii() and digits.isdigit()
        if not (in_range and FIRST_FIXED <= int(digits) < FIRST_ALLOCATED and name):
            raise Invalid(
                f"fixed identity {text!r} is not NUMBER=NAME with a number from {FIRST_FIXED} to"
                f" {FIRST_ALLOCATED - 1}, for example {FIRST_FIXED}=kv-store"
            )
        label, number = Label.parse(f"{RESERVED}:{name}"), NumericIdentity(int(digits))
        taken = reserved_number(Labels([label])) is not None or number in by_name.values()
        if taken or name in by_name:
            raise Invalid(f"fixed identity {text!r}: its number or its name is given away already")
        by_name[name] = number
    return by_name
