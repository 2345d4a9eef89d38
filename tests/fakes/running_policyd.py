"""policyd in this process, on a memory store and a unix socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tessera_wire.policy.v1 import policy_pb2 as pb
from tessera_wire.policy.v1 import policy_pb2_grpc

from services.policyd.main import Policyd
from services.runtime.clock import SystemClock
from services.runtime.config import PolicydConfig
from services.store.memory import MemoryStore
from services.store.model import Put, Txn
from services.wire.client import call, channel
from services.wire.server import serve

DEADLINE_S = 15.0


@dataclass(frozen=True, slots=True)
class Running:
    store: MemoryStore
    policyd: Policyd
    target: str
    admin: policy_pb2_grpc.PolicyAdminStub

    async def put(self, *items: tuple[str, bytes]) -> int:
        """In one transaction; its revision."""
        txn = Txn(success=tuple(Put(key, value) for key, value in items))
        return (await self.store.txn(txn)).revision

    async def apply(
        self, manifests: str, *, dry_run: bool = False, namespace: str = ""
    ) -> pb.ApplyResponse:
        request = pb.ApplyRequest(
            manifests=manifests.encode(),
            dry_run=dry_run,
            default_namespace=namespace,
            author="ann",
            source="test.yaml",
        )
        return await call(self.admin.Apply, request, deadline_s=DEADLINE_S)

    async def delete(self, *refs: pb.PolicyRef) -> pb.DeleteResponse:
        return await call(self.admin.Delete, pb.DeleteRequest(refs=refs), deadline_s=DEADLINE_S)

    async def list(self, **only: str) -> pb.ListResponse:
        return await call(self.admin.List, pb.ListRequest(**only), deadline_s=DEADLINE_S)

    async def wait(self, revision: int, timeout_s: float = 10.0) -> pb.WaitRealisedResponse:
        request = pb.WaitRealisedRequest(revision=revision, timeout_ms=int(timeout_s * 1000))
        return await call(self.admin.WaitRealised, request, deadline_s=DEADLINE_S + timeout_s)

    async def status(self) -> pb.StatusResponse:
        return await call(self.admin.Status, pb.StatusRequest(), deadline_s=DEADLINE_S)


@asynccontextmanager
async def running_policyd(
    store: MemoryStore, folder: Path, config: PolicydConfig | None = None
) -> AsyncIterator[Running]:
    """The store outlives it, so that one can follow another on the same socket."""
    policyd = Policyd(store, SystemClock(), config or PolicydConfig())
    async with (
        policyd.following(),
        serve(f"unix://{folder}/policyd.sock", policyd.register) as bound,
        channel(bound.target) as dialled,
    ):
        yield Running(store, policyd, bound.target, policy_pb2_grpc.PolicyAdminStub(dialled))
