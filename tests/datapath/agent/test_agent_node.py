"""The agent on real maps, interfaces and packets, with a fake control plane."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from pyroaring import BitMap

from datapath import links
from datapath.agent.main import agent
from datapath.agent.record import outer_name
from services.policy.clauses import (
    Action,
    Clause,
    Direction,
    LocalPolicy,
    PolicyRef,
    PortRange,
    RuleSource,
)
from services.runtime.errors import Unusable
from tests.fakes.control_plane import ControlPlane, control_plane
from tests.fakes.kernel_node import built_object, needs_kernel
from tests.fakes.netns import Namespace, namespace
from tests.fakes.node_agent import RunningAgent, config_for, running, unpin, until

pytestmark = pytest.mark.kernel

WEB = PolicyRef("CiliumNetworkPolicy", "shop", "web")
TCP80 = (PortRange(6, 80, 80),)


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    needs_kernel()
    built_object()
    async with control_plane() as made:
        yield made


@pytest.fixture
async def node(plane: ControlPlane, tmp_path: Path) -> AsyncIterator[RunningAgent]:
    config = config_for(tmp_path, plane.target)
    try:
        async with running(config) as made:
            yield made
            for endpoint in (await made.get("/v1/endpoints"))[1]["endpoints"]:
                await made.delete(str(endpoint["id"]))
    finally:
        unpin(config)


@pytest.fixture
def client() -> Iterator[Namespace]:
    with namespace("tsr-agent") as made:
        yield made


@pytest.fixture
def server() -> Iterator[Namespace]:
    with namespace("tsr-agent") as made:
        yield made


async def add(node: RunningAgent, ns: Namespace, name: str, *labels: str) -> dict:
    status, body = await node.post(
        namespace="shop", name=name, netns=ns.path, labels=list(labels or [f"k8s:app={name}"])
    )
    assert status == 201, body
    return body


async def reach(ns: Namespace, address: str, port: int = 80) -> bool:
    return await asyncio.to_thread(ns.can_connect, address, port)


def allow_from(identity: int, group: int, rule: int = 16) -> LocalPolicy:
    clause = Clause(Direction.INGRESS, (group,), TCP80, Action.ALLOW, rule)
    return LocalPolicy(identity, True, False, (clause,), (WEB,), ())


def flags_of(interface: str) -> int:
    return int(Path(f"/sys/class/net/{interface}/flags").read_text(), 16)


def damage(folder: Path) -> None:
    for file in folder.glob("*.ckpt"):
        file.write_bytes(b"TSRA garbage")


def set_aside(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.corrupt")}


async def realised(plane: ControlPlane, revision: int) -> None:
    acks = plane.policies.acks
    await until(lambda: bool(acks) and acks[-1].revision >= revision, f"revision {revision}")


async def test_packets_are_judged_by_the_streamed_policy(
    plane: ControlPlane, node: RunningAgent, client: Namespace, server: Namespace
) -> None:
    a, b = await add(node, client, "client"), await add(node, server, "web")
    assert a["identity"] != b["identity"]
    with server.listen(80):
        assert await reach(client, b["ip"])
        plane.policies.rules[16] = RuleSource(16, WEB, 0, "ingress[0]", 12)
        revision = plane.policies.set_policy(allow_from(b["identity"], group=7))
        await realised(plane, revision)
        assert not await reach(client, b["ip"])
        revision = plane.policies.set_group(7, BitMap([a["identity"]]))
        await realised(plane, revision)
        assert await reach(client, b["ip"])
        revision = plane.policies.set_group(7, BitMap())
        await realised(plane, revision)
        assert not await reach(client, b["ip"])
    dropped = await node.flows("?verdict=dropped")
    last = dropped[-1]
    assert last["rule"] == "default deny: selected by CiliumNetworkPolicy shop/web"
    assert (last["source"]["name"], last["destination"]["name"]) == ("client", "web")
    assert last["drop_reason_desc"] == "POLICY_DENIED"
    assert any("no policy selects" in flow["rule"] for flow in await node.flows("?last=50"))


async def test_a_deleted_endpoint_leaves_nothing(
    plane: ControlPlane, node: RunningAgent, client: Namespace, server: Namespace
) -> None:
    a, b = await add(node, client, "client"), await add(node, server, "web")
    with server.listen(80):
        assert await reach(client, b["ip"])
    for made in (a, b):
        status, body = await node.delete(f"shop/{'client' if made is a else 'web'}")
        assert (status, body["state"]) == (200, "deleted")
    tables = node.tables
    assert not list(tables.endpoints.items())
    assert not list(tables.local4.items())
    assert not list(tables.ct.items())
    held = {address for address, entry in tables.ipcache4.items() if entry.identity != 1}
    tables.close()
    assert not held
    assert not plane.identities.announced
    assert not plane.identities.references
    assert not plane.addresses.owners
    assert not {a["interface"], b["interface"]} & set(links.list_outer("tes"))
    assert (await node.get("/v1/endpoints"))[1] == {"endpoints": []}


async def test_two_endpoints_of_one_identity_share_it_until_the_last_goes(
    plane: ControlPlane, node: RunningAgent, client: Namespace, server: Namespace
) -> None:
    a = await add(node, client, "one", "k8s:app=web")
    b = await add(node, server, "two", "k8s:app=web")
    assert a["identity"] == b["identity"]
    await node.delete("shop/one")
    assert plane.identities.references == {b["identity"]}
    await node.delete(str(b["id"]))
    assert not plane.identities.references


async def test_bad_requests_are_refused_by_name(
    plane: ControlPlane, node: RunningAgent, client: Namespace
) -> None:
    status, body = await node.post(namespace="shop", name="x", netns="no-such-ns", labels=[])
    assert status == 422
    assert "no-such-ns" in body["detail"]
    status, body = await node.post(namespace="shop", name="x", netns=client.path, labels=["bad"])
    assert status == 422
    assert "'bad'" in body["detail"]
    await add(node, client, "x")
    status, body = await node.post(namespace="shop", name="x", netns=client.path)
    assert status == 409
    assert (await node.get("/v1/endpoints/shop/none"))[0] == 404
    assert (await node.get("/v1/status"))[0] == 200


async def test_a_failed_creation_is_undone(
    plane: ControlPlane, node: RunningAgent, client: Namespace
) -> None:
    plane.addresses.size = 0
    status, body = await node.post(namespace="shop", name="x", netns=client.path)
    assert (status, body["detail"]) == (507, "pool default is used up")
    assert (await node.get("/v1/endpoints"))[1] == {"endpoints": []}
    assert not plane.identities.references
    plane.addresses.size = 10
    await add(node, client, "x")


async def test_a_restart_drops_no_packet_and_works_without_the_control_plane(
    tmp_path: Path, client: Namespace, server: Namespace
) -> None:
    needs_kernel()
    built_object()
    async with control_plane() as plane:
        config = config_for(tmp_path, plane.target)
        async with running(config) as node:
            a, b = await add(node, client, "client"), await add(node, server, "web")
            plane.policies.set_group(7, BitMap([a["identity"]]))
            revision = plane.policies.set_policy(allow_from(b["identity"], group=7))
            await realised(plane, revision)
            before = dict(node.tables.endpoints.items())
    try:
        with server.listen(80) as listener:
            live = await asyncio.to_thread(client.connect, b["ip"], 80)
            accepted, _ = await asyncio.to_thread(listener.accept)
            assert await reach(client, b["ip"])  # nobody is home, and it is judged
            assert not await reach(client, b["ip"], 81)
            async with running(config) as node:
                assert dict(node.tables.endpoints.items()) == before
                status, body = await node.get("/v1/status")
                assert status == 200
                assert body["policyd"] != "connected"
                assert await reach(client, b["ip"])
                assert not await reach(client, b["ip"], 81)
                live.sendall(b"x")
                assert await asyncio.to_thread(accepted.recv, 1) == b"x"
                flows = await node.flows("?verdict=dropped")
                assert flows[-1]["rule"].endswith("selected by CiliumNetworkPolicy shop/web")
                listed = (await node.get("/v1/endpoints"))[1]["endpoints"]
                assert [e["name"] for e in listed] == ["client", "web"]
            live.close()
            accepted.close()
    finally:
        unpin(config)
        for made in (a, b):
            await asyncio.to_thread(links.delete_veth, made["interface"])


async def test_endpoints_that_vanished_while_the_agent_was_away_are_cleared(
    tmp_path: Path, client: Namespace
) -> None:
    needs_kernel()
    built_object()
    async with control_plane() as plane:
        config = config_for(tmp_path, plane.target)
        try:
            async with running(config) as node:
                made = await add(node, client, "client")
            await asyncio.to_thread(links.delete_veth, made["interface"])
            async with running(config) as node:
                await until(lambda: not plane.addresses.owners)
                await until(lambda: not plane.identities.references)
                assert not list(node.tables.endpoints.items())
                assert (await node.get("/v1/endpoints"))[1] == {"endpoints": []}
        finally:
            unpin(config)


async def test_a_lost_checkpoint_leaves_the_endpoints_in_force(
    tmp_path: Path, client: Namespace, server: Namespace
) -> None:
    needs_kernel()
    built_object()
    async with control_plane() as plane:
        config = config_for(tmp_path, plane.target)
        try:
            async with running(config) as node:
                a, b = await add(node, client, "client"), await add(node, server, "web")
                revision = plane.policies.set_policy(allow_from(b["identity"], group=7))
                await realised(plane, revision)
            damage(Path(config.state_dir))
            async with running(config) as node:
                listed = (await node.get("/v1/endpoints"))[1]["endpoints"]
                assert {e["ip"] for e in listed} == {a["ip"], b["ip"]}
                with server.listen(80):
                    assert not await reach(client, b["ip"])
                    revision = plane.policies.set_group(7, BitMap([a["identity"]]))
                    await realised(plane, revision)
                    assert await reach(client, b["ip"])
                for endpoint in listed:
                    await node.delete(str(endpoint["id"]))
                assert set_aside(Path(config.state_dir)) == {"endpoints.corrupt", "view.corrupt"}
        finally:
            unpin(config)


async def test_a_lost_lease_publishes_everything_again(
    plane: ControlPlane, tmp_path: Path, client: Namespace
) -> None:
    plane.identities.ttl_s = 1
    config = config_for(tmp_path, plane.target)
    try:
        async with running(config) as node:
            made = await add(node, client, "client")
            plane.identities.lose_lease()
            await until(lambda: made["ip"] in plane.identities.announced)
            assert plane.identities.references == {made["identity"]}
            await node.delete("shop/client")
    finally:
        unpin(config)


async def test_a_broken_stream_comes_back_without_a_flapping_row(
    plane: ControlPlane, node: RunningAgent, client: Namespace
) -> None:
    made = await add(node, client, "client")
    plane.policies.set_group(7, BitMap([500]))
    await realised(plane, plane.policies.set_policy(allow_from(made["identity"], group=7)))
    tables = node.tables
    before = dict(tables.policy_peer.items()), dict(tables.endpoints.items())
    hellos, acks = plane.policies.hellos, len(plane.policies.acks)
    plane.policies.break_streams()
    await until(lambda: plane.policies.hellos > hellos and len(plane.policies.acks) > acks)
    assert (dict(tables.policy_peer.items()), dict(tables.endpoints.items())) == before
    tables.close()


async def test_a_second_agent_is_refused_with_the_first_ones_pid(
    plane: ControlPlane, node: RunningAgent
) -> None:
    with pytest.raises(Unusable, match=r"another agent runs here \(pid \d+\)"):
        await agent(node.config)


async def test_the_carrier_comes_last(
    plane: ControlPlane, node: RunningAgent, client: Namespace
) -> None:
    """While no policy arrives, the interface exists and is down."""
    plane.policies.withheld = True
    async with asyncio.TaskGroup() as group:
        adding = group.create_task(node.post(namespace="shop", name="x", netns=client.path))
        outer = outer_name("n1", "shop", "x")
        await until(lambda: bool(links.list_outer(outer)) and bool(plane.identities.references))
        assert not flags_of(outer) & 1
        identity = next(iter(plane.identities.references))
        plane.policies.set_policy(LocalPolicy(identity, False, False, (), (), ()))
        status, _ = await adding
    assert status == 201
    assert flags_of(outer) & 1
    assert socket.if_nametoindex(outer)
