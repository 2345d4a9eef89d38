"""Manifests to policies: YAML or JSON text in, policies and problems out; never an exception.

bytes --decode--> text --tree.documents--> nodes --one object each--> policies, problems
                                             (kind: List unwrapped)
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from services.policy.cidr_groups import CidrGroup, is_cidr_group, read_cidr_group
from services.policy.cilium import read_specs
from services.policy.clauses import PolicyRef
from services.policy.cluster import read_cluster_policy
from services.policy.features import Dialect, Features
from services.policy.kubernetes import read_network_policy
from services.policy.model import Policy
from services.policy.reader import Cursor, Fields, Problem, Report, TooMany, one_of
from services.policy.selectors import CLUSTER_SCOPED, Kind, Scope
from services.policy.tree import (
    MAX_BYTES,
    Document,
    Malformed,
    Mapping,
    Node,
    Place,
    Scalar,
    documents,
    from_plain,
    plain,
)
from services.policy.validate import warnings

__all__ = ["Parsed", "ParsedPolicy", "Problem", "parse"]

_API_VERSIONS: Final = {
    Kind.CNP: "cilium.io/v2",
    Kind.CCNP: "cilium.io/v2",
    Kind.NETWORK_POLICY: "networking.k8s.io/v1",
    Kind.CLUSTER_NETWORK_POLICY: "policy.networking.k8s.io/v1alpha2",
}
_METADATA: Final = (
    "name",
    "namespace",
    "labels",
    "annotations",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "finalizers",
    "generateName",
    "managedFields",
    "ownerReferences",
    "selfLink",
)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_NAMESPACE = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
MAX_ALL_PROBLEMS: Final = 1000
_START: Final = Place(1, 1, 0)


@dataclass(frozen=True, slots=True)
class ParsedPolicy:
    """`manifest_text`: the document exactly as written; parsing it again yields the same rules.

    Give the namespace of the policy as default_namespace then: the text may name none. Positions
    count from the start of what was parsed, so they differ where the text was one of several.
    """

    policy: Policy
    manifest_text: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """cidr_groups: read where Features.CIDR_GROUPS are let in."""

    policies: tuple[ParsedPolicy, ...]
    problems: tuple[Problem, ...]
    cidr_groups: tuple[CidrGroup, ...] = ()

    @property
    def refused(self) -> bool:
        return any(problem.severity == "error" for problem in self.problems)


def parse(
    text: bytes, source: str, default_namespace: str, features: Features = Features.NODE
) -> Parsed:
    """Every document of `text`. A document with an error yields problems and no policy.

    A use of what `features` leaves out is such an error.
    """
    problems: list[Problem] = []
    policies: dict[PolicyRef, ParsedPolicy] = {}
    groups: list[CidrGroup] = []
    try:
        for node, path, manifest in _objects(_decode(text)):
            report = Report(source, features)
            root = Cursor(report, path, node, node.place)
            policy = None
            if is_cidr_group(node) and Features.CIDR_GROUPS in features:
                groups += _group(root)
            else:
                policy = _read_object(root, default_namespace)
            problems += report.problems
            _refuse_flood(problems, node)
            if policy is None or report.failed:
                continue
            if policy.ref in policies:
                report.error(path, node.place, f"{policy.ref} is given twice; remove one of them")
                problems.append(report.problems[-1])
                continue
            policies[policy.ref] = ParsedPolicy(policy, manifest)
    except Malformed as fault:
        message, line, column = fault.message, fault.line, fault.column
        problems.append(Problem("error", None, "", line, column, message, source))
    if not policies and not problems and not groups:
        nothing = "no policy in it; expected a YAML or JSON document with a kind"
        problems.append(Problem("error", None, "", 1, 1, nothing, source))
    return Parsed(tuple(policies.values()), tuple(problems), tuple(groups))


def _group(root: Cursor) -> list[CidrGroup]:
    try:
        group = read_cidr_group(root)
    except TooMany:
        group, root.report.failed = None, True
    return [] if group is None or root.report.failed else [group]


def parse_object(
    value: object,
    source: str,
    default_namespace: str,
    features: Features = Features.NODE,
    dialect: Dialect = Dialect.TESSERA,
) -> tuple[Policy | None, tuple[Problem, ...]]:
    """One object that JSON has read already, so without places; None when it has an error."""
    report = Report(source, features, dialect)
    try:
        root = Cursor(report, "", from_plain(value), _START)
        policy = _read_object(root, default_namespace)
    except Malformed as fault:
        report.error("", _START, fault.message)
        policy = None
    return None if report.failed else policy, tuple(report.problems)


def _decode(text: bytes) -> str:
    if len(text) > MAX_BYTES:
        message = f"{len(text)} bytes, at most {MAX_BYTES} at once; apply it in several files"
        raise Malformed(message, 1, 1)
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        column = error.start - text.rfind(b"\n", 0, error.start)
        raise Malformed("not UTF-8 text; save the file as UTF-8", line, column) from error


# ------------------------------------------------------------------ documents


def _objects(text: str) -> Iterator[tuple[Node, str, str]]:
    """Each object with its field path and its own text; a List gives its items."""
    for document in documents(text):
        items = _list_items(document.root)
        if items is None:
            yield document.root, "", _document_text(text, document)
            continue
        for n, node in enumerate(items):
            yield node, f"items[{n}]", _item_text(text, node)


def _list_items(root: Node) -> tuple[Node, ...] | None:
    if not isinstance(root, Mapping):
        return None
    kind, items = root.entries.get("kind"), root.entries.get("items")
    if kind is None or items is None or not isinstance(kind.value, Scalar):
        return None
    if not str(kind.value.value).endswith("List") or isinstance(items.value, Scalar | Mapping):
        return None
    return items.value.items


def _document_text(text: str, document: Document) -> str:
    """Without the rest of the separator line."""
    own = text[document.start : document.end]
    first, newline, rest = own.partition("\n")
    return rest if newline and not first.strip() else own


def _item_text(text: str, node: Node) -> str:
    """The lines of a list item, shifted to the left margin; rewritten as JSON if that fails.

    It fails where an item uses an anchor of another item.
    """
    start = node.place.offset
    indented = " " * (node.place.column - 1) + text[start : node.end]
    own = textwrap.dedent(indented).rstrip() + "\n"
    try:
        again = [document.root for document in documents(own)]
    except Malformed:
        again = []
    if len(again) == 1 and plain(again[0]) == plain(node):
        return own
    return json.dumps(plain(node), indent=2, ensure_ascii=False) + "\n"


# ------------------------------------------------------------------ one object


def _read_object(root: Cursor, default_namespace: str) -> Policy | None:
    try:
        return _policy(root, default_namespace or "default")
    except TooMany:
        root.report.failed = True
        return None


def _refuse_flood(problems: list[Problem], node: Node) -> None:
    if len(problems) >= MAX_ALL_PROBLEMS:
        message = "too many problems; the rest was not read"
        raise Malformed(message, node.place.line, node.place.column)


def _policy(root: Cursor, default_namespace: str) -> Policy | None:
    document = root.fields("apiVersion", "kind", "metadata", "spec", "specs", "status")
    kind = _kind(document) if document is not None else None
    if document is None or kind is None:
        return None
    ref = _ref(document, kind, default_namespace)
    if ref is None:
        return None
    root.report.ref = ref
    policy = _read(document, kind, ref)
    if not root.report.failed:
        _warn(document, policy)
    return policy


def _read(document: Fields, kind: Kind, ref: PolicyRef) -> Policy:
    if kind in (Kind.CNP, Kind.CCNP):
        return Policy(ref, read_specs(document, Scope(ref.namespace or None)))
    if (specs := document.get("specs")) is not None:
        specs.error(f"a {kind} has one spec; write one policy for each")
    if kind is Kind.NETWORK_POLICY:
        return Policy(ref, read_network_policy(document, ref.namespace))
    tier, rules = read_cluster_policy(document)
    return Policy(ref, rules, tier)


def _kind(document: Fields) -> Kind | None:
    known = tuple(str(kind) for kind in Kind)
    at = document.require("kind", f"one of {', '.join(known)}")
    word = at.text() if at is not None else None
    if at is None or word is None:
        return None
    if word not in known:
        at.error(f"kind {one_of(known, word)}")
        return None
    kind = Kind(word)
    if kind is Kind.CLUSTER_NETWORK_POLICY and not at.needs(
        Features.TIERS, f"kind {kind} is not supported yet; use {Kind.CCNP}"
    ):
        return None
    wanted = _API_VERSIONS[kind]
    version_at = document.require("apiVersion", f"write apiVersion: {wanted}")
    version = version_at.text() if version_at is not None else None
    if version_at is not None and version is not None and version != wanted:
        version_at.error(f"apiVersion {version!r} of {kind} is not known; write {wanted}")
    return kind


def _ref(document: Fields, kind: Kind, default_namespace: str) -> PolicyRef | None:
    at = document.require("metadata", "give the policy a metadata.name")
    metadata = at.fields() if at is not None else None
    for key, cursor in metadata or ():
        if key not in _METADATA:
            cursor.advise(f"unknown field {key!r} says nothing; remove it")
    name_at = metadata.require("name", "give the policy a name") if metadata is not None else None
    name = name_at.text() if name_at is not None else None
    if metadata is None or name_at is None or name is None:
        return None
    if not (len(name) <= 253 and _NAME.fullmatch(name)):
        name_at.error(
            f"name {name!r} is not lower-case letters, digits, '-' and '.', at most 253, with a"
            " letter or digit at both ends"
        )
        return None
    namespace = _namespace(metadata, kind, default_namespace)
    return None if namespace is None else PolicyRef(str(kind), namespace, name)


def _namespace(metadata: Fields, kind: Kind, default_namespace: str) -> str | None:
    at = metadata.get("namespace")
    written = at.text() if at is not None else default_namespace
    if kind in CLUSTER_SCOPED:
        if at is not None and written:
            at.error(f"a {kind} has no namespace; remove it")
            return None
        return ""
    if written is None:
        return None
    written = written or default_namespace
    if len(written) <= 63 and _NAMESPACE.fullmatch(written):
        return written
    (at or metadata.at).error(
        f"namespace {written!r} is not lower-case letters, digits and '-', at most 63, with a"
        " letter or digit at both ends"
    )
    return None


def _warn(document: Fields, policy: Policy) -> None:
    report, prefix = document.at.report, document.at.path
    for warned in warnings(policy):
        path = _rule_path(document, warned.rule_index)
        at = document.get("spec") or document.get("specs") or document.at
        place = at.place
        if warned.clause is not None:
            path += f".{warned.clause.list_name}[{warned.clause.index}]"
            position = warned.clause.position
            place = Place(position.line, position.column, 0)
        report.advise(f"{prefix}.{path}" if prefix else path, place, warned.message)


def _rule_path(document: Fields, rule_index: int) -> str:
    """Spec comes first, then specs in order."""
    if document.get("spec") is None:
        return f"specs[{rule_index}]"
    return "spec" if rule_index == 0 else f"specs[{rule_index - 1}]"
