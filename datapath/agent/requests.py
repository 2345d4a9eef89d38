"""What is asked of the agent, refused before anything of it is made when nobody could fulfil it."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from typing import Annotated

import msgspec

from datapath.agent.endpoints import Wanted
from datapath.links import INTERFACE_NAME
from identity.labels import K8S, NAMESPACE_KEY, RESERVED
from identity.selector import key_problem, value_problem
from services.runtime.errors import Invalid


class EndpointRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`labels`: each source:key=value. `netns`: a name of `ip netns`, or a path. `pool`: empty for
    the one that serves the namespace. `ips`: static addresses, one of a family. `retain_s`: how
    long the addresses are kept for the endpoint of this name once it is deleted. `adopt`: the
    interface is there, has an address and goes on having it."""

    namespace: str
    name: str
    netns: str
    labels: tuple[str, ...] = ()
    interface: str = "eth0"
    pool: str = ""
    ips: tuple[str, ...] = ()
    retain_s: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    adopt: bool = False

    def wanted(self) -> Wanted:
        """Raises `Invalid` for what no step of the creation could be content with."""
        check_name(self.namespace, self.name)
        if not self.netns or ("/" in self.netns and not self.netns.startswith("/")):
            raise Invalid(
                f"netns {self.netns!r} is neither a name of `ip netns` nor an absolute path"
            )
        if not INTERFACE_NAME.fullmatch(self.interface) or self.interface in (".", ".."):
            raise Invalid(
                f"interface {self.interface!r} is no interface name: 1 to 15 characters, no "
                "space, / or :"
            )
        check_labels(self.namespace, self.labels)
        check_static(self.ips)
        if self.adopt and (self.pool or self.ips or self.retain_s):
            raise Invalid("adopt: an interface that is there keeps its address; leave out the rest")
        return Wanted(
            self.namespace,
            self.name,
            self.labels,
            self.netns,
            self.interface,
            pool=self.pool,
            static=self.ips,
            retain_s=self.retain_s,
            adopted=self.adopt,
        )


class LabelsRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All labels of an endpoint, in place of those it has; each source:key=value."""

    labels: tuple[str, ...]


def check_name(namespace: str, name: str) -> None:
    for field, text in (("namespace", namespace), ("name", name)):
        if not text or not text.isprintable() or "/" in text or len(text) > 253:
            raise Invalid(f"{field} {text!r}: 1 to 253 printable characters without /")
    if value_problem(namespace) or namespace != namespace.lower():
        raise Invalid(
            f"namespace {namespace!r} could not be named by a policy: use lower-case "
            "letters, digits and -, at most 63"
        )


def check_static(ips: Iterable[str]) -> None:
    families = []
    for ip in ips:
        try:
            families.append(ip_address(ip).version)
        except ValueError:
            raise Invalid(f"address {ip!r} is not an IP address") from None
    if len(set(families)) < len(families):
        raise Invalid(f"addresses {', '.join(ips)}: give at most one of each family")


def check_labels(namespace: str, labels: Iterable[str]) -> None:
    """Each source:key=value, and one that a policy could select by."""
    for label in labels:
        _check(namespace, label)


def _check(namespace: str, label: str) -> None:
    source, colon, rest = label.partition(":")
    key, _, value = rest.partition("=")
    if not source or not colon or not key:
        raise Invalid(f"label {label!r} is not source:key=value, such as k8s:app=web")
    if source == RESERVED:
        raise Invalid(f"label {label!r}: nobody is given a label of the source {RESERVED}")
    if source != K8S:
        return
    if problem := key_problem(key) or value_problem(value):
        raise Invalid(f"label {label!r} could not be selected by a policy: {problem}")
    if key == NAMESPACE_KEY and value != namespace:
        raise Invalid(
            f"label {label!r} names another namespace than the endpoint's, "
            f"{namespace!r}: remove it, it is added here"
        )
