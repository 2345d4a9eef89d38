"""A second reading of cases, straight from their JSON, as slow and plain as it can be.

It shares nothing with services/policy: every question walks every policy. It speaks of allow, deny
and redirect, in the dialect of Cilium 1.17; authentication and conflicts of parsers are left out.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Identity = dict[str, Any]
Peer = Callable[[Identity], bool]
Ports = list[tuple[int, int, int]] | None  # protocol, first, last; None: everything

NAMESPACE = "io.kubernetes.pod.namespace"
NAMESPACE_LABELS = "io.cilium.k8s.namespace.labels."
PROTOCOLS = {"TCP": (6,), "UDP": (17,), "SCTP": (132,), "ANY": (6, 17, 132), "": (6, 17, 132)}
ICMP_TYPES = {"EchoReply": 0, "EchoRequest": 8, "DestinationUnreachable": 3, "TimeExceeded": 11}
ICMPV6_TYPES = {"EchoRequest": 128, "EchoReply": 129, "DestinationUnreachable": 1}
CLUSTER = ("host", "remote-node", "init", "ingress", "health", "unmanaged", "kube-apiserver")

RESERVED = (
    "host",
    "world",
    "unmanaged",
    "health",
    "init",
    "remote-node",
    "kube-apiserver remote-node",
    "ingress",
    "world-ipv4",
    "world-ipv6",
)


@dataclass
class Grant:
    """A clause as it applies to one subject."""

    deny: bool
    peer: Peer
    ports: Ports
    proxied: bool


@dataclass
class Side:
    touched: bool = False
    default_deny: bool = False


class Plain:
    def __init__(self, case: Any, valid: Sequence[bool]) -> None:
        self.case = case
        self.identities = {one["id"]: one for one in case["identities"]}
        # Reserved ones need not be listed.
        for number, names in enumerate(RESERVED, 1):
            labels = [f"reserved:{name}" for name in names.split()]
            self.identities.setdefault(number, {"id": number, "labels": labels})
        objects = [given.get("object", given) for given in case["policies"]]
        self.rules = [
            (one, rule)
            for one, fine in zip(objects, valid, strict=True)
            if fine
            for rule in rules_of(one)
        ]

    def verdicts(self, subject: Any) -> tuple[bool, bool, list[str]]:
        me = self.identities[subject["id"]]
        sides = {"ingress": self.side(me, "ingress"), "egress": self.side(me, "egress")}
        grants = {way: list(self.grants(me, subject, way)) for way in sides}
        found = []
        for way, number, proto, port, *_ in subject["probes"]:
            peer = self.identities.get(number, {"id": number, "labels": []})
            found.append(self.judge(sides[way], grants[way], way, peer, proto, port))
        return sides["ingress"].touched, sides["egress"].touched, found

    def side(self, me: Identity, way: str) -> Side:
        side = Side()
        mode = self.case.get("enforcement_mode") or "default"
        if mode == "never":
            return side
        for one, rule in self.rules:
            if not selects(one, rule, me) or not stands(one, rule, way):
                continue
            side.touched = True
            off = (rule.get("enableDefaultDeny") or {}).get(way) is False
            side.default_deny = side.default_deny or not off
        if mode == "always" or has(me, "reserved", "init"):
            side.touched = side.default_deny = True
        return side

    def judge(
        self, side: Side, grants: list[Grant], way: str, peer: Identity, proto: int, port: int
    ) -> str:
        if not side.touched:
            return "allow"
        said = [
            grant
            for grant in grants
            if grant.peer(peer)
            and (
                grant.ports is None or any(p == proto and a <= port <= b for p, a, b in grant.ports)
            )
        ]
        if any(grant.deny for grant in said):
            return "deny"
        if any(grant.proxied for grant in said):
            return "redirect"
        own_host = way == "ingress" and peer["id"] == 1
        return "allow" if said or own_host or not side.default_deny else "deny"

    def grants(self, me: Identity, subject: Any, way: str) -> Iterator[Grant]:
        for deny in (False, True):
            demands = [
                selector(scoped(one, rule, wanted))
                for one, rule in self.rules
                if selects(one, rule, me)
                for clause in rule.get(way + "Deny" * deny) or ()
                for wanted in clause.get(("from" if way == "ingress" else "to") + "Requires") or ()
            ]
            for one, rule in self.rules:
                if not selects(one, rule, me):
                    continue
                for clause in rule.get(way + "Deny" * deny) or ():
                    if one["kind"] == "NetworkPolicy":
                        if way in types_of(rule):
                            yield from self.kubernetes(one, clause, subject, way)
                    else:
                        yield from self.cilium(one, rule, clause, subject, way, deny, demands)

    # -------------------------------------------------------------- Cilium's kinds

    def cilium(
        self,
        one: Any,
        rule: Any,
        clause: Any,
        subject: Any,
        way: str,
        deny: bool,
        demands: list[Peer],
    ) -> Iterator[Grant]:
        side = "from" if way == "ingress" else "to"
        peers: list[Peer] = []
        fields = [side + name for name in ("Endpoints", "CIDR", "CIDRSet", "Entities", "FQDNs")]
        for wanted in clause.get(fields[0]) or ():
            chosen = selector(scoped(one, rule, wanted))
            peers.append(lambda i, c=chosen: c(i) and all(demand(i) for demand in demands))
        peers += [within(text, ()) for text in clause.get(fields[1]) or ()]
        peers += [
            within(block["cidr"], block.get("except") or ())
            for block in clause.get(fields[2]) or ()
        ]
        peers += [entity(name) for name in clause.get(fields[3]) or ()]
        peers += [self.named(wanted) for wanted in clause.get(fields[4]) or ()]
        speaks = any(clause.get(field) is not None for field in fields)
        entries, icmps = clause.get("toPorts"), clause.get("icmps")
        if not speaks and not entries and not icmps:
            return

        def peer(i: Identity) -> bool:
            return not speaks or any(chosen(i) for chosen in peers)

        if icmps:
            yield Grant(deny, peer, [one for entry in icmps for one in icmp(entry)], False)
        elif entries:
            for entry in entries:
                ports = [
                    p for port in entry.get("ports") or () for p in self.port(port, subject, way)
                ]
                rules = entry.get("rules") or {}
                proxied = any(rules.get(name) for name in ("http", "kafka", "dns", "l7"))
                yield Grant(deny, peer, ports, bool(proxied or entry.get("serverNames")))
        else:
            yield Grant(deny, peer, None, False)

    def port(self, port: Any, subject: Any, way: str) -> Iterator[tuple[int, int, int]]:
        for proto in PROTOCOLS[port.get("protocol", "").upper()]:
            yield from self.numbered(proto, str(port["port"]), port.get("endPort"), subject, way)

    def numbered(
        self, proto: int, word: str, end: int | None, subject: Any, way: str
    ) -> Iterator[tuple[int, int, int]]:
        if not word.isdigit():
            table = subject["named_ports"] if way == "ingress" else self.case["egress_named_ports"]
            name = next(text for text, numbers in PROTOCOLS.items() if numbers == (proto,))
            number = (table or {}).get(f"{name}/{word.lower()}")
            if number:
                yield proto, number, number
            return
        first = int(word)
        last = end if end and end > first else first
        yield (proto, 0, 65535) if last == 0 else (proto, first, last)

    def named(self, wanted: Any) -> Peer:
        text = (wanted.get("matchName") or wanted.get("matchPattern")).lower().rstrip(".")
        pattern = ".*" if text == "*" else re.escape(text).replace(r"\*", "[-a-z0-9_]*")

        def chosen(identity: Identity) -> bool:
            address, _, length = (identity.get("prefix") or "").partition("/")
            if length not in ("32", "128"):
                return False
            names = (self.case.get("dns") or {}).get(address) or ()
            return any(re.fullmatch(pattern, name.lower().rstrip(".")) for name in names)

        return chosen

    # -------------------------------------------------------------- NetworkPolicy

    def kubernetes(self, one: Any, clause: Any, subject: Any, way: str) -> Iterator[Grant]:
        written = clause.get("from" if way == "ingress" else "to")
        peers = [pods(one["metadata"]["namespace"], each) for each in written or ()]
        ports: Ports = None
        if clause.get("ports"):
            ports = []
            for each in clause["ports"]:
                (proto,) = PROTOCOLS[each.get("protocol") or "TCP"]
                word = str(each.get("port", "0"))
                ports += self.numbered(proto, word, each.get("endPort"), subject, way)

        def peer(identity: Identity) -> bool:
            return not written or any(chosen(identity) for chosen in peers)

        yield Grant(False, peer, ports, False)


# ------------------------------------------------------------------ rules


def rules_of(one: Any) -> list[Any]:
    return [*([one["spec"]] if one.get("spec") is not None else []), *(one.get("specs") or ())]


def types_of(rule: Any) -> set[str]:
    given = rule.get("policyTypes")
    if given:
        return {word.lower() for word in given}
    return {"ingress", "egress"} if rule.get("egress") else {"ingress"}


def stands(one: Any, rule: Any, way: str) -> bool:
    if one["kind"] == "NetworkPolicy":
        return way in types_of(rule)
    return bool(rule.get(way) or rule.get(f"{way}Deny"))


def selects(one: Any, rule: Any, me: Identity) -> bool:
    space = one["metadata"].get("namespace")
    if one["kind"] == "NetworkPolicy":
        return (
            selector(rule.get("podSelector") or {}, "k8s")(me)
            and label(me, "any", NAMESPACE) == space
        )
    written = rule["endpointSelector"]
    if one["kind"] == "CiliumNetworkPolicy":
        kept = dict(written.get("matchLabels") or {})
        for key in [k for k in kept if k in (f"k8s:{NAMESPACE}",)]:
            del kept[key]
        own = label(me, "k8s", NAMESPACE) == space
        return own and selector({**written, "matchLabels": kept})(me)
    return selector(written)(me)


def scoped(one: Any, rule: Any, wanted: Any) -> Any:
    """The selector of a peer with what the kind adds to it."""
    keys = [*(wanted.get("matchLabels") or {})]
    keys += [each["key"] for each in wanted.get("matchExpressions") or ()]
    parts = [key_of(key) for key in keys]
    if any(source == "reserved" for source, _ in parts):
        return wanted
    spoken = (NAMESPACE_LABELS, NAMESPACE)
    if any((s in ("any", "k8s") and k.startswith(spoken[0])) or k == spoken[1] for s, k in parts):
        return wanted
    if one["kind"] == "CiliumNetworkPolicy":
        added = {
            "key": f"k8s:{NAMESPACE}",
            "operator": "In",
            "values": [one["metadata"]["namespace"]],
        }
    else:
        added = {"key": f"k8s:{NAMESPACE}", "operator": "Exists"}
    return {**wanted, "matchExpressions": [*(wanted.get("matchExpressions") or ()), added]}


# ------------------------------------------------------------------ peers


def key_of(text: str) -> tuple[str, str]:
    source, colon, key = text.partition(":")
    return (source, key) if colon else ("any", text)


def label(identity: Identity, source: str, key: str) -> str | None:
    """Its value; None when there is no such label."""
    for text in identity.get("labels") or ():
        name, _, value = text.partition("=")
        own_source, own_key = key_of(name)
        if own_key == key and source in ("any", own_source):
            return value
    return None


def has(identity: Identity, source: str, key: str) -> bool:
    return label(identity, source, key) is not None


def selector(written: Any, source: str = "", prefix: str = "") -> Peer:
    tests: list[Peer] = []

    def test(key: str, operator: str, values: Sequence[str]) -> None:
        own, name = (source, prefix + key) if source else key_of(key)
        tests.append(lambda i: expression(label(i, own, name), operator, values))

    for key, value in (written.get("matchLabels") or {}).items():
        test(key, "In", [value])
    for each in written.get("matchExpressions") or ():
        test(each["key"], each["operator"], each.get("values") or ())
    return lambda identity: all(one(identity) for one in tests)


def expression(value: str | None, operator: str, values: Sequence[str]) -> bool:
    return {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[operator]


def within(cidr: str, without: Sequence[str]) -> Peer:
    outer = ipaddress.ip_network(cidr, strict=False)
    holes = [ipaddress.ip_network(text, strict=False) for text in without]
    worlds = {"world", f"world-ipv{outer.version}"}

    def chosen(identity: Identity) -> bool:
        if identity["id"] in (2, 9, 10) and outer.prefixlen == 0 and not holes:
            return any(has(identity, "reserved", name) for name in worlds)
        if not identity.get("prefix"):
            return False
        own = ipaddress.ip_network(identity["prefix"])
        if own.version != outer.version or not own.subnet_of(outer):  # type: ignore[arg-type]
            return False
        return not any(own.overlaps(hole) for hole in holes)

    return chosen


def entity(name: str) -> Peer:
    def chosen(identity: Identity) -> bool:
        match name:
            case "all":
                return True
            case "world":
                worlds = ("world", "world-ipv4", "world-ipv6")
                return any(has(identity, "reserved", each) for each in worlds)
            case "cluster":
                own = label(identity, "k8s", "io.cilium.k8s.policy.cluster") == "default"
                return own or any(has(identity, "reserved", each) for each in CLUSTER)
            case _:
                return has(identity, "reserved", name)

    return chosen


def icmp(entry: Any) -> Iterator[tuple[int, int, int]]:
    for one in entry.get("fields") or ():
        proto, names = (58, ICMPV6_TYPES) if one.get("family") == "IPv6" else (1, ICMP_TYPES)
        number = names[one["type"]] if one["type"] in names else int(one["type"])
        yield (proto, 0, 65535) if (proto, number) == (1, 0) else (proto, number, number)


def pods(space: str, each: Any) -> Peer:
    if each.get("ipBlock"):
        return within(each["ipBlock"]["cidr"], each["ipBlock"].get("except") or ())
    if each.get("podSelector") is None and each.get("namespaceSelector") is None:
        return lambda identity: False
    chosen = selector(each.get("podSelector") or {}, "k8s")
    spaces = each.get("namespaceSelector")
    if spaces is None:
        return lambda i: chosen(i) and label(i, "k8s", NAMESPACE) == space
    where = selector(spaces, "k8s", NAMESPACE_LABELS)
    named = bool(spaces.get("matchLabels") or spaces.get("matchExpressions"))
    return lambda i: chosen(i) and where(i) and (named or has(i, "k8s", NAMESPACE))
