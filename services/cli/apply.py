"""Applying and deleting policies over REST, and waiting until the nodes have realised them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from services.cli import views
from services.cli.client import Client, Reply, failure, segment
from services.cli.manifests import CLUSTER_SCOPED, Manifest
from services.runtime.errors import Retry

# Storing and resolving ten thousand policies in one request stays under it.
APPLY_DEADLINE_S = 60.0
# The server answers at its own deadline; this much later the connection itself is at fault.
WAIT_SLACK_S = 10.0
_YAML = "application/yaml"
_UNPROCESSABLE = 422


@dataclass(frozen=True, slots=True)
class Request:
    manifests: tuple[Manifest, ...]
    namespace: str
    author: str
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    revision: int
    policies: tuple[views.AppliedPolicy, ...]
    problems: tuple[views.Problem, ...] = ()
    refused: bool = False
    realised: views.Realised | None = None

    @property
    def failed(self) -> bool:
        return self.refused or (self.realised is not None and not self.realised.done)

    def realised_line(self) -> str:
        """`3 of 3 nodes realised revision 57`, or which have not, and why."""
        assert self.realised is not None
        nodes = self.realised.nodes
        late = [node for node in nodes if not self._has(node)]
        line = f"{len(nodes) - len(late)} of {len(nodes)} nodes realised revision {self.revision}"
        if not nodes:
            return f"{line}; no node is registered: is the agent running?"
        return "; ".join((line, *(f"{node.node}: {_why(node)}" for node in late)))

    def _has(self, node: views.NodeState) -> bool:
        return node.realised >= self.revision and not node.reason

    def to_json(self) -> bytes:
        return msgspec.json.encode(
            {
                "revision": self.revision,
                "applied": not self.refused,
                "policies": self.policies,
                "problems": self.problems,
                **({"realised": self.realised} if self.realised is not None else {}),
            }
        )


def apply_all(door: Client, request: Request, traceparent: str, wait_s: float) -> Outcome:
    """`wait_s` 0: do not wait."""
    headers = {"content-type": _YAML}
    if traceparent:
        headers["traceparent"] = traceparent
    if len(request.manifests) > 1 and not request.dry_run:
        trial = _send(door, request, headers, dry_run=True)
        if trial.refused:
            return trial
    outcome = _send(door, request, headers, dry_run=request.dry_run)
    if outcome.refused or request.dry_run:
        return outcome
    outcome = _with_states(door, outcome)
    return waited(door, outcome, wait_s) if wait_s else outcome


def _with_states(door: Client, outcome: Outcome) -> Outcome:
    """Accepted is not enforced: the server says so of the stored policy, not of the request."""
    kinds = {policy.kind for policy in outcome.policies}
    query = {"fields": "kind,namespace,name,state"}
    query |= {"kind": kinds.pop()} if len(kinds) == 1 else {}
    body = door.all_of("/v1/policies", "policies", query)
    stored = views.decode(body, views.StoredPolicies).policies
    states = {(one.kind, one.namespace, one.name): one.state for one in stored}
    policies = tuple(
        msgspec.structs.replace(one, state=states.get((one.kind, one.namespace, one.name), ""))
        for one in outcome.policies
    )
    return replace(outcome, policies=policies)


def waited(door: Client, outcome: Outcome, wait_s: float) -> Outcome:
    """What changed nothing waits for what is stored: an earlier change may still be on its way."""
    revision = outcome.revision or views.decode(door.get("/v1/nodes"), views.Nodes).revision
    body = door.get(
        "/v1/policies/wait",
        {"revision": revision, "timeout_s": f"{wait_s:g}"},
        deadline_s=wait_s + WAIT_SLACK_S,
    )
    realised = views.decode(body, views.Realised)
    return replace(outcome, revision=revision, realised=realised)


def _send(door: Client, request: Request, headers: Mapping[str, str], *, dry_run: bool) -> Outcome:
    """Stops at the first file refused; what went before it is in the outcome."""
    revision, refused = 0, False
    policies: list[views.AppliedPolicy] = []
    problems: list[views.Problem] = []
    for manifest in request.manifests:
        reply = door.exchange(
            "POST",
            "/v1/policies",
            {
                "namespace": request.namespace,
                "dry_run": int(dry_run),
                "source": manifest.source,
                "author": request.author,
            },
            manifest.text,
            headers,
            APPLY_DEADLINE_S,
        )
        applied = _answer(reply, dry_run=dry_run)
        revision = max(revision, applied.revision)
        policies += applied.policies
        problems += applied.problems
        refused = not reply.ok
        if refused and not dry_run:
            break
    return Outcome(revision, tuple(policies), tuple(problems), refused)


def _answer(reply: Reply, *, dry_run: bool) -> views.Applied:
    if not reply.ok and reply.status != _UNPROCESSABLE:
        error = failure(reply)
        if isinstance(error, Retry) and not dry_run:
            # A write that was not confirmed in time may have been done none the less.
            raise Retry(f"{error} (to be sure of what is stored, apply it again)")
        raise error
    applied = views.decode(reply.body, views.Applied)
    if not reply.ok and not applied.problems:
        raise failure(reply)
    return applied


def delete_one(door: Client, ref: views.PolicyName, author: str) -> Outcome:
    scope = "_" if ref.kind in CLUSTER_SCOPED else segment(ref.namespace)
    path = f"/v1/policies/{ref.kind}/{scope}/{segment(ref.name)}"
    deleted = views.decode(door.request("DELETE", path, {"author": author}), views.Deleted)
    return Outcome(deleted.revision, deleted.policies)


def delete_all(
    door: Client, manifests: Sequence[Manifest], namespace: str, author: str
) -> tuple[Outcome, tuple[views.PolicyName, ...]]:
    """What was deleted, and what was named and is not there."""
    revision = 0
    policies: list[views.AppliedPolicy] = []
    absent: list[views.PolicyName] = []
    for manifest in manifests:
        query = {"namespace": namespace, "source": manifest.source, "author": author}
        body = door.request(
            "POST", "/v1/policies/delete", query, manifest.text, {"content-type": _YAML}
        )
        deleted = views.decode(body, views.Deleted)
        revision = max(revision, deleted.revision)
        policies += deleted.policies
        absent += deleted.not_found
    return Outcome(revision, tuple(policies)), tuple(absent)


def _why(node: views.NodeState) -> str:
    if node.reason:
        return node.reason
    if not node.connected:
        return f"not connected, last realised revision {node.realised}"
    return f"still at revision {node.realised}"
