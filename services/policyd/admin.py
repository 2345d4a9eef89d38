"""PolicyAdmin over gRPC: apply, delete, list, wait until realised, status, history, rollback.

Writes go to the store (apply.py), answers about what is in force come from the view. A write is
answered once the view here has seen it, so that a List that follows shows it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Set
from itertools import chain, islice
from typing import Final, TypeAlias

import grpc
import grpc.aio
from tessera_wire.policy.v1 import policy_pb2, policy_pb2_grpc

from services.policy.advice import idle
from services.policy.clauses import PolicyRef
from services.policy.parse import Parsed, parse
from services.policyd import admission, history, records
from services.policyd.apply import Applied, Outcome, Policies
from services.policyd.nodes import Nodes, NodeState, Pulse
from services.policyd.problems import advice_to_wire, problem_to_wire
from services.policyd.realisation import realisation
from services.policyd.records import Broken, Stored, alone, whole
from services.policyd.state import State
from services.policyd.view import View
from services.runtime.clock import Clock
from services.runtime.errors import Invalid, NotFound
from services.runtime.log import logger
from services.store.model import Store
from services.wire.convert import ref_from_wire, ref_to_wire

log = logger(__name__)

# Some 40 documents, 20 ms.
_LARGE_BYTES: Final = 16_384
# How often a watched status is told anew at most.
_STATUS_PAUSE_S: Final = 0.1
# A view that lags longer than this has trouble of its own; the write itself is done.
_SEEN_S: Final = 2.0

_STDIN: Final = "stdin"
# A reader needs the first few.
_MAX_ADVICE: Final = 100

_Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"


class PolicyAdmin(policy_pb2_grpc.PolicyAdminServicer):
    def __init__(
        self,
        store: Store,
        policies: Policies,
        state: State,
        view: View,
        nodes: Nodes,
        pulse: Pulse,
        clock: Clock,
        limits: admission.Limits,
    ) -> None:
        self._store = store
        self._limits = limits
        self._clock = clock
        self._policies = policies
        self._state = state
        self._view = view
        self._nodes = nodes
        self._pulse = pulse

    def register(self, server: grpc.aio.Server) -> None:
        policy_pb2_grpc.add_PolicyAdminServicer_to_server(self, server)

    async def Apply(
        self, request: policy_pb2.ApplyRequest, context: _Context
    ) -> policy_pb2.ApplyResponse:
        # A thread costs more than a document, and a file of them would hold up every stream.
        large = len(request.manifests) > _LARGE_BYTES
        parsed = await asyncio.to_thread(_parse, request) if large else _parse(request)
        problems = [problem_to_wire(problem) for problem in parsed.problems]
        if not parsed.refused:
            found = admission.objections(self._state, parsed.policies, self._limits)
            problems += map(problem_to_wire, found)
        if parsed.refused or found:
            return policy_pb2.ApplyResponse(problems=problems)
        advised = (idle(one.policy, self._state.resolver) for one in parsed.policies)
        few = islice(chain.from_iterable(advised), _MAX_ADVICE)
        problems += [advice_to_wire(one, request.source or _STDIN) for one in few]
        if request.dry_run:
            outcome = await self._policies.preview(parsed.policies)
        else:
            own = whole(request.manifests, parsed)
            if large and not own:
                held = self._state.held(policy.policy.ref for policy in parsed.policies)
                own = await asyncio.to_thread(alone, parsed, held)
            with self._state.just_parsed.remembering(own):
                outcome = await self._policies.apply(
                    parsed.policies, request.author, expected=frozenset(request.expected)
                )
                await self._seen(outcome)
        return policy_pb2.ApplyResponse(
            revision=outcome.revision,
            policies=_applied_to_wire(outcome.applied),
            problems=problems,
        )

    async def Delete(
        self, request: policy_pb2.DeleteRequest, context: _Context
    ) -> policy_pb2.DeleteResponse:
        refs = [ref_from_wire(ref) for ref in request.refs]
        expected = frozenset(request.expected)
        outcome = await self._policies.delete(refs, request.author, expected)
        await self._seen(outcome)
        return policy_pb2.DeleteResponse(
            revision=outcome.revision,
            policies=_applied_to_wire(outcome.applied),
            not_found=[ref_to_wire(ref) for ref in outcome.not_found],
        )

    async def List(
        self, request: policy_pb2.ListRequest, context: _Context
    ) -> policy_pb2.ListResponse:
        refs = self._state.policies.keys() | self._state.broken.keys()
        wanted = sorted(ref for ref in refs if _matches(ref, request))
        return policy_pb2.ListResponse(
            policies=[self._stored_to_wire(ref) for ref in wanted],
            revision=self._state.revision,
        )

    async def WaitRealised(
        self, request: policy_pb2.WaitRealisedRequest, context: _Context
    ) -> policy_pb2.WaitRealisedResponse:
        done = True
        try:
            async with asyncio.timeout(request.timeout_ms / 1000):
                await self._realised(request.revision)
        except TimeoutError:
            done = False
        return policy_pb2.WaitRealisedResponse(
            done=done,
            revision=request.revision,
            nodes=self._nodes_to_wire(request.revision),
        )

    async def Status(
        self, request: policy_pb2.StatusRequest, context: _Context
    ) -> policy_pb2.StatusResponse:
        state = self._state
        return policy_pb2.StatusResponse(
            revision=state.revision,
            policies=len(state.policies.keys() | state.broken.keys()),
            identities=state.identities,
            addresses=len(state.addresses.rows),
            groups=state.groups,
            nodes=self._nodes_to_wire(state.revision),
        )

    async def PolicyStatus(
        self, request: policy_pb2.PolicyRef, context: _Context
    ) -> policy_pb2.PolicyStatusResponse:
        return self._realisation_to_wire(ref_from_wire(request))

    async def WatchPolicyStatus(
        self, request: policy_pb2.PolicyRef, context: _Context
    ) -> AsyncIterator[policy_pb2.PolicyStatusResponse]:
        ref = ref_from_wire(request)
        told = self._realisation_to_wire(ref)
        yield told
        while self._is_stored(ref):
            await self._pulse.wait()
            if self._is_stored(ref) and (now := self._realisation_to_wire(ref)) != told:
                told = now
                yield now
                await self._clock.sleep(_STATUS_PAUSE_S)

    async def History(
        self, request: policy_pb2.HistoryRequest, context: _Context
    ) -> policy_pb2.HistoryResponse:
        found = await history.read(self._store, _history_prefix(request.ref))
        changes = [change for each in found.values() for change in history.with_diffs(each)]
        wanted = [change for change in changes if _matches(change.ref, request.ref)]
        wanted.sort(key=lambda change: change.revision, reverse=True)
        shown = wanted[: request.limit or None]
        return policy_pb2.HistoryResponse(changes=map(_change_to_wire, shown))

    async def Rollback(
        self, request: policy_pb2.RollbackRequest, context: _Context
    ) -> policy_pb2.ApplyResponse:
        """Invalid: what it was is not known any more, or would be refused today."""
        back = await self._way_back(request)
        parsed = [records.parse_stored(ref, manifest) for ref, manifest in back.manifests]
        refused = next((one for one in parsed if one.refused), None)
        if refused is not None:
            first = next(p for p in refused.problems if p.severity == "error")
            raise Invalid(f"{first.ref} of then is refused today: {first.message}")
        policies = [policy for one in parsed for policy in one.policies]
        if request.dry_run:
            outcome = await self._policies.preview(policies, back.gone)
        else:
            outcome = await self._policies.apply(policies, request.author, back.gone)
            await self._seen(outcome)
        return policy_pb2.ApplyResponse(
            revision=outcome.revision, policies=_applied_to_wire(outcome.applied)
        )

    async def _way_back(self, request: policy_pb2.RollbackRequest) -> history.Return:
        if request.revision > self._state.revision:
            raise Invalid(
                f"revision {request.revision} is in the future; it is {self._state.revision} now"
            )
        changes = await history.read(self._store, _history_prefix(request.ref))
        now = {ref: one.revision_and_manifest for ref, one in self._state.policies.items()}
        now |= {ref: one.revision_and_manifest for ref, one in self._state.broken.items()}
        if request.ref.name:
            ref = ref_from_wire(request.ref)
            if ref not in changes and ref not in now:
                raise NotFound(f"policy {ref} does not exist and has no history")
            changes = {ref: changes.get(ref, [])}
            now = {ref: now[ref]} if ref in now else {}
        return history.back_to(request.revision, changes, now)

    def _is_stored(self, ref: PolicyRef) -> bool:
        return ref in self._state.policies or ref in self._state.broken

    # ------------------------------------------------------------------ waiting

    async def _seen(self, outcome: Outcome) -> None:
        try:
            async with asyncio.timeout(_SEEN_S):
                await self._view.reached(outcome.revision)
        except TimeoutError:
            log.warning("policyd.view_lags", revision=outcome.revision)

    async def _realised(self, revision: int) -> None:
        await self._view.reached(revision)
        behind = self._first_behind(revision)
        while behind is not None:
            await self._pulse.wait()
            # As long as this one is behind the others need not be looked at.
            if not self._is_behind(behind, revision):
                behind = self._first_behind(revision)

    def _first_behind(self, revision: int) -> str | None:
        return next((node for node in self._expected() if self._is_behind(node, revision)), None)

    def _is_behind(self, node: str, revision: int) -> bool:
        expected = self._nodes.is_connected(node) or self._state.addresses.has_node(node)
        return expected and bool(self._nodes.state(node, revision).reason)

    def _expected(self) -> Set[str]:
        return self._state.addresses.nodes | self._nodes.connected

    # ------------------------------------------------------------------ to the wire

    def _stored_to_wire(self, ref: PolicyRef) -> policy_pb2.StoredPolicy:
        good, broken = self._state.policies.get(ref), self._state.broken.get(ref)
        record = good.record if good is not None else None
        manifest = record.manifest if record is not None else ""
        return policy_pb2.StoredPolicy(
            ref=ref_to_wire(ref),
            manifest=(broken.manifest if broken is not None else manifest).encode(),
            revision=max(one.revision for one in (good, broken) if one is not None),
            author=record.author if record is not None else "",
            applied_at=record.applied_at if record is not None else "",
            state=_state_of(good, broken),
            selects=len(self._state.resolver.selected_by(ref)),
        )

    def _realisation_to_wire(self, ref: PolicyRef) -> policy_pb2.PolicyStatusResponse:
        found = realisation(self._state, self._nodes, ref)
        stored = self._stored_to_wire(ref)
        return policy_pb2.PolicyStatusResponse(
            ref=stored.ref,
            revision=found.revision,
            author=stored.author,
            applied_at=stored.applied_at,
            state=stored.state,
            selects=found.selects,
            nodes=[
                policy_pb2.PolicyOnNode(
                    node=one.node,
                    stage=one.stage,
                    connected=one.connected,
                    realised=one.realised,
                    reason=one.reason,
                    identities=one.identities,
                )
                for one in found.nodes
            ],
        )

    def _nodes_to_wire(self, revision: int) -> list[policy_pb2.NodeState]:
        states = self._nodes.states(self._state.addresses.nodes, revision)
        seen = self._state.revision
        ahead = f"policyd itself has seen revision {seen} only" if seen < revision else ""
        return [_node_to_wire(state, ahead) for state in states]


def _parse(request: policy_pb2.ApplyRequest) -> Parsed:
    return parse(
        request.manifests, request.source or _STDIN, request.default_namespace or "default"
    )


def _history_prefix(ref: policy_pb2.PolicyRef) -> str:
    return history.history_of(ref_from_wire(ref)) if ref.name else history.HISTORY_PREFIX


def _change_to_wire(change: history.Change) -> policy_pb2.PolicyChange:
    return policy_pb2.PolicyChange(
        ref=ref_to_wire(change.ref),
        revision=change.revision,
        action=change.record.action,
        author=change.record.author,
        changed_at=change.record.changed_at,
        manifest=change.record.manifest.encode(),
        diff=change.diff,
    )


def _matches(ref: PolicyRef, request: policy_pb2.ListRequest | policy_pb2.PolicyRef) -> bool:
    return (
        request.kind in ("", ref.kind)
        and request.namespace in ("", ref.namespace)
        and request.name in ("", ref.name)
    )


def _state_of(good: Stored | None, broken: Broken | None) -> str:
    if broken is None:
        return good.policy.state if good is not None else ""
    if good is None:
        return f"broken: {broken.reason}; nothing of it is in force"
    return f"broken: {broken.reason}; its version of revision {good.revision} stays in force"


def _applied_to_wire(applied: Iterable[Applied]) -> list[policy_pb2.AppliedPolicy]:
    return [
        policy_pb2.AppliedPolicy(ref=ref_to_wire(one.ref), action=one.action) for one in applied
    ]


def _node_to_wire(state: NodeState, ahead: str) -> policy_pb2.NodeState:
    return policy_pb2.NodeState(
        node=state.node,
        connected=state.connected,
        realised=state.realised,
        reason=ahead or state.reason,
    )
