"""Identity, address and policy service of one small cluster, in this process, over real gRPC.

State is in plain attributes that a test reads and sets.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address

import grpc.aio
from pyroaring import BitMap
from tessera_wire.identity.v1 import identity_pb2 as idpb
from tessera_wire.identity.v1 import identity_pb2_grpc as idrpc
from tessera_wire.ipam.v1 import ipam_pb2 as ippb
from tessera_wire.ipam.v1 import ipam_pb2_grpc as iprpc
from tessera_wire.policy.v1 import policy_pb2 as popb
from tessera_wire.policy.v1 import policy_pb2_grpc as porpc

from services.policy.clauses import GroupId, LocalPolicy, RuleSource
from services.runtime.errors import Exhausted, Retry
from services.wire import convert
from services.wire.server import serve


class FakeIdentities(idrpc.IdentityServiceServicer):
    def __init__(self) -> None:
        self.numbers: dict[tuple[str, ...], int] = {}
        self.references: set[int] = set()
        self.announced: dict[str, idpb.Announcement] = {}
        self.lease = 100
        self.ttl_s = 300
        self.next = 1000
        self.away = False

    def lose_lease(self) -> None:
        """What hangs on a lease goes with it."""
        self.lease += 1
        self.references.clear()
        self.announced.clear()

    def _check(self) -> None:
        if self.away:
            raise Retry("etcd is away")

    async def OpenSession(self, request, context):
        self._check()
        resumed = request.previous_lease == self.lease
        return idpb.Session(lease=self.lease, ttl_s=self.ttl_s, resumed=resumed)

    async def KeepAlive(self, request, context):
        self._check()
        return idpb.KeepAliveResponse(ttl_s=self.ttl_s if request.lease == self.lease else 0)

    async def CloseSession(self, request, context):
        self._check()
        if request.lease == self.lease:
            self.lose_lease()
        return idpb.CloseSessionResponse()

    async def Allocate(self, request, context):
        self._check()
        results = []
        for item in request.items:
            labels = tuple(item.labels.labels)
            if labels not in self.numbers:
                self.numbers[labels] = self.next
                self.next += 1
            self.references.add(self.numbers[labels])
            results.append(idpb.AllocateResult(identity=self.numbers[labels], labels=item.labels))
        return idpb.AllocateResponse(results=results)

    async def Release(self, request, context):
        self._check()
        self.references -= set(request.identities)
        return idpb.ReleaseResponse()

    async def Announce(self, request, context):
        self._check()
        for item in request.items:
            self.announced[item.ip] = item
        return idpb.AnnounceResponse()

    async def Withdraw(self, request, context):
        self._check()
        for ip in request.ips:
            self.announced.pop(ip, None)
        return idpb.WithdrawResponse()


class FakeAddresses(iprpc.IpamServiceServicer):
    def __init__(self, first: str) -> None:
        self.first = IPv4Address(first)
        self.owners: dict[tuple[str, str], IPv4Address] = {}
        self.size = 200
        self._next = 0

    async def Allocate(self, request, context):
        owner = (request.owner.namespace, request.owner.name)
        if owner not in self.owners:
            if len(self.owners) >= self.size:
                raise Exhausted("pool default is used up")
            self.owners[owner] = self.first + self._next
            self._next += 1
        address = ippb.Address(ip=str(self.owners[owner]), pool="default", node=request.node)
        return ippb.AllocateResponse(addresses=[address])

    async def Release(self, request, context):
        owner = (request.owner.namespace, request.owner.name)
        return ippb.ReleaseResponse(released=self.owners.pop(owner, None) is not None)

    async def SyncWindows(self, request, context):
        """Nobody gets a window here: every address is asked for."""
        return ippb.SyncWindowsResponse(node_gone_s=86_400)

    async def ReportInventory(self, request, context):
        return ippb.ReportInventoryResponse()


# No update has this revision: ends the stream.
_END = 2**63


@dataclass
class Subscriber:
    node: str
    interests: set[int]
    outbox: asyncio.Queue[popb.Update] = field(default_factory=asyncio.Queue)


class FakePolicies(porpc.PolicyDistributionServicer):
    """`open_by_default`: every identity asked for gets an open policy unless one was set."""

    def __init__(self) -> None:
        self.revision = 1
        self.policies: dict[int, LocalPolicy] = {}
        self.groups: dict[GroupId, BitMap] = {}
        self.rules: dict[int, RuleSource] = {}
        self.addresses: dict[str, popb.Address] = {}
        self.acks: list[popb.Ack] = []
        self.subscribers: list[Subscriber] = []
        self.hellos = 0
        self.withheld = False

    def policy(self, identity: int) -> popb.LocalPolicy:
        known = self.policies.get(identity)
        return convert.local_policy_to_wire(
            known or LocalPolicy(identity, False, False, (), (), ())
        )

    def snapshot(self, interests: set[int]) -> popb.Update:
        return popb.Update(
            revision=self.revision,
            snapshot=True,
            groups=[
                popb.Group(id=g, identities=convert.pack_ids(m)) for g, m in self.groups.items()
            ],
            local_policies=[] if self.withheld else [self.policy(i) for i in sorted(interests)],
            rules=[convert.rule_to_wire(rule) for rule in self.rules.values()],
            addresses=self.addresses.values(),
        )

    def push(self, update: popb.Update) -> int:
        """To every subscriber; its revision."""
        self.revision += 1
        update.revision = self.revision
        for subscriber in self.subscribers:
            subscriber.outbox.put_nowait(update)
        return self.revision

    def set_policy(self, policy: LocalPolicy) -> int:
        self.policies[policy.identity] = policy
        return self.push(popb.Update(local_policies=[convert.local_policy_to_wire(policy)]))

    def set_group(self, group: int, members: BitMap) -> int:
        self.groups[GroupId(group)] = members
        packed = convert.pack_ids(members)
        return self.push(popb.Update(groups=[popb.Group(id=group, identities=packed)]))

    def break_streams(self) -> None:
        for subscriber in self.subscribers:
            subscriber.outbox.put_nowait(popb.Update(revision=_END))

    async def Subscribe(self, requests, context):
        hello = (await anext(requests)).hello
        self.hellos += 1
        subscriber = Subscriber(hello.node, set(hello.identities))
        self.subscribers.append(subscriber)
        try:
            yield self.snapshot(subscriber.interests)
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read(requests, subscriber))
                while True:
                    update = await subscriber.outbox.get()
                    if update.revision == _END:
                        break
                    yield update
                reader.cancel()
        finally:
            self.subscribers.remove(subscriber)

    async def _read(self, requests, subscriber: Subscriber) -> None:
        async for message in requests:
            if message.HasField("ack"):
                self.acks.append(message.ack)
            if message.HasField("interest"):
                subscriber.interests |= set(message.interest.add)
                subscriber.interests -= set(message.interest.remove)
                policies = [self.policy(i) for i in message.interest.add]
                subscriber.outbox.put_nowait(
                    popb.Update(
                        revision=self.revision,
                        local_policies=[] if self.withheld else policies,
                        local_policies_removed=message.interest.remove,
                    )
                )


@dataclass(frozen=True)
class ControlPlane:
    identities: FakeIdentities
    addresses: FakeAddresses
    policies: FakePolicies
    target: str


@asynccontextmanager
async def control_plane(
    listen: str = "127.0.0.1:0", first: str = "10.79.0.10"
) -> AsyncIterator[ControlPlane]:
    identities, addresses, policies = FakeIdentities(), FakeAddresses(first), FakePolicies()

    def register(server: grpc.aio.Server) -> None:
        idrpc.add_IdentityServiceServicer_to_server(identities, server)
        iprpc.add_IpamServiceServicer_to_server(addresses, server)
        porpc.add_PolicyDistributionServicer_to_server(policies, server)

    async with serve(listen, register) as bound:
        yield ControlPlane(identities, addresses, policies, bound.target)
