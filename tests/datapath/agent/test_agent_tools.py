"""`tessera bpf` and `tessera agent --cleanup`, run as commands beside real maps and packets."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pyroaring import BitMap

from datapath import links
from datapath.attachments import Attachments
from datapath.maps.layout import IpcacheEntry, PolicyPeerKey
from services.policy.clauses import (
    Action,
    Clause,
    Direction,
    LocalPolicy,
    PolicyRef,
    PortRange,
    RuleSource,
)
from tests.fakes.control_plane import ControlPlane, control_plane
from tests.fakes.kernel_node import built_object, needs_kernel
from tests.fakes.netns import Namespace, namespace
from tests.fakes.node_agent import RunningAgent, config_for, running, unpin, until

pytestmark = pytest.mark.kernel

WEB = PolicyRef("CiliumNetworkPolicy", "shop", "web")
ALLOWED = 7
RULE = 16


@dataclass(frozen=True)
class Node:
    """`web` lets `client` in on TCP 80 and nobody else."""

    agent: RunningAgent
    plane: ControlPlane
    client_ns: Namespace
    web_ns: Namespace
    client: dict
    web: dict

    async def tessera(self, *words: str) -> tuple[int, str, str]:
        return await asyncio.to_thread(run, self.agent.config, *words)

    async def rows(self, *words: str) -> list[dict]:
        status, out, err = await self.tessera("bpf", *words, "-o", "json")
        assert status == 0, err
        return [json.loads(line) for line in out.splitlines()]

    async def reach(self, port: int = 80) -> bool:
        return await asyncio.to_thread(self.client_ns.can_connect, self.web["ip"], port)


def run(config, *words: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    environ = {
        **os.environ,
        "TESSERA_AGENT_SOCKET": f"{config.run_dir}/agent.sock",
        "TESSERA_BPF_DIR": config.bpf_dir,
    }
    done = subprocess.run(
        [sys.executable, "-m", "services.cli.main", *words],
        capture_output=True, text=True, env=environ, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def left_in(config) -> list[Path]:
    folders = (config.state_dir, config.run_dir, config.bpf_dir)
    return [path for folder in folders for path in Path(folder).rglob("*")]


@pytest.fixture
def spaces() -> Iterator[tuple[Namespace, Namespace]]:
    with namespace("tsr-tools") as one, namespace("tsr-tools") as other:
        yield one, other


@pytest.fixture
async def node(tmp_path: Path, spaces: tuple[Namespace, Namespace]) -> AsyncIterator[Node]:
    needs_kernel()
    built_object()
    async with control_plane() as plane:
        config = config_for(tmp_path, plane.target)
        try:
            async with running(config) as agent:
                made = []
                for name, space in zip(("client", "web"), spaces, strict=True):
                    body = {"namespace": "shop", "name": name, "netns": space.path}
                    status, answer = await agent.post(**body, labels=[f"k8s:app={name}"])
                    assert status == 201, answer
                    made.append(answer)
                node = Node(agent, plane, *spaces, *made)
                await protect(node)
                yield node
                for endpoint in (await agent.get("/v1/endpoints"))[1]["endpoints"]:
                    await agent.delete(str(endpoint["id"]))
        finally:
            unpin(config)


async def protect(node: Node) -> None:
    clause = Clause(Direction.INGRESS, (ALLOWED,), (PortRange(6, 80, 80),), Action.ALLOW, RULE)
    policies = node.plane.policies
    policies.rules[RULE] = RuleSource(RULE, WEB, 0, "ingress[0]", 12)
    policies.set_group(ALLOWED, BitMap([node.client["identity"]]))
    policies.break_streams()  # the rule's name comes with a snapshot
    revision = policies.set_policy(
        LocalPolicy(node.web["identity"], True, False, (clause,), (WEB,), ())
    )
    await until(lambda: bool(policies.acks) and policies.acks[-1].revision >= revision)
    await until(lambda: bool(policies.subscribers))


async def test_the_tables_are_told_as_the_kernel_holds_them(node: Node) -> None:
    with node.web_ns.listen(80):
        assert await node.reach()
    assert not await node.reach(81)
    endpoints = {row["id"]: row for row in await node.rows("endpoint", "list")}
    web = endpoints[node.web["id"]]
    assert (web["address"], web["interface"]) == (node.web["ip"], node.web["interface"])
    assert (web["slot_out"], web["flags"]) == (0, ["ready"])

    chosen = ("--endpoint", "shop/web", "--identity", str(node.client["identity"]))
    (allowed, rest) = await node.rows("policy", "list", *chosen)
    assert (allowed["proto"], allowed["ports"], allowed["verdict"]) == ("TCP", "80", "allow")
    assert (allowed["slot"], allowed["rule"]) == (web["slot_in"], RULE)
    assert (rest["proto"], rest["verdict"]) == ("any", "none")

    (row,) = await node.rows("ipcache", "list", "--address", node.client["ip"])
    assert row["identity"] == node.client["identity"]
    found = await node.rows("ct", "list", "--address", node.web["ip"], "--proto", "tcp")
    assert [(c["source"], c["destination_port"]) for c in found] == [(node.client["ip"], 80)]
    assert found[0]["ingress"]["rule"] == RULE
    assert min(found[0]["packets"]) >= 2

    denied = [m for m in await node.rows("metrics", "list") if m["name"] == "POLICY_DENIED"]
    assert [(m["direction"], m["packets"] > 0) for m in denied] == [("ingress", True)]
    fill = {row["name"]: row["entries"] for row in await node.rows("map", "list")}
    assert (fill["endpoints"], fill["local4"]) == (2, 2)


async def test_tables_for_people_name_endpoints_and_rules(node: Node) -> None:
    status, out, _ = await node.tessera("bpf", "policy", "list", "--endpoint", "shop/web")
    assert status == 0
    row = next(line for line in out.splitlines() if "80/TCP" in line)
    assert "shop/web" in row
    assert "ALLOW" in row
    assert "CiliumNetworkPolicy shop/web rule 0 ingress[0] line 12" in row
    _, out, _ = await node.tessera("bpf", "policy", "list", "--slot", "1")
    assert "everyone else" in out
    assert "default deny" in out


async def test_the_busiest_connection_is_told_first(node: Node) -> None:
    with node.web_ns.listen(80) as listener:
        connect = node.client_ns.connect
        busy, quiet = [await asyncio.to_thread(connect, node.web["ip"], 80) for _ in "ab"]
        served = [await asyncio.to_thread(listener.accept) for _ in "ab"]
        ports = [sock.getsockname()[1] for sock in (busy, quiet)]
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(node.rows("ct", "top", "--port", "80", "--interval", "1"))
            while not asking.done():
                busy.send(b"x" * 900)
                quiet.send(b"x")
                served[0][0].recv(65536)
                await asyncio.sleep(0.02)
        for sock in (busy, quiet, *(one for one, _ in served)):
            sock.close()
    top = asking.result()
    assert [row["connection"]["source_port"] for row in top] == ports
    assert top[0]["octets_per_s"] > 2 * top[1]["octets_per_s"] > 0


async def test_a_flushed_connection_is_judged_anew(node: Node) -> None:
    with node.web_ns.listen(80) as listener:
        live = await asyncio.to_thread(node.client_ns.connect, node.web["ip"], 80)
        served, _ = await asyncio.to_thread(listener.accept)
        with live, served:
            status, _, err = await node.tessera("bpf", "ct", "flush")
            assert status == 1
            assert "flush what?" in err
            status, out, _ = await node.tessera("bpf", "ct", "flush", "--port", "80")
            assert (status, out) == (0, "forgot 1 connection\n")
            served.settimeout(0.5)
            # What web sends is no reply of anything any more; client's next packet is judged.
            live.sendall(b"again")
            assert await asyncio.to_thread(served.recv, 5) == b"again"
            (row,) = await node.rows("ct", "list", "--port", "80")
            assert row["ingress"]["rule"] == RULE


async def test_rows_that_differ_are_told_and_mended(node: Node) -> None:
    status, out, err = await node.tessera("bpf", "verify")
    assert status == 0, (out, err)
    tables = node.agent.tables
    slot = next(r.slot_in for _, r in tables.endpoints.items() if r.slot_in)
    client = PolicyPeerKey(slot, node.client["identity"])
    row = tables.policy_peer.get(client)
    assert row is not None
    tables.policy_peer.delete_many([client])
    tables.policy_peer.put_many({PolicyPeerKey(slot, 4242): row})
    tables.ipcache4.put_many({0x0A010203: IpcacheEntry(4242)})
    await asyncio.to_thread(
        Attachments({}, Path(node.agent.config.bpf_dir), "auto").detach, node.web["interface"]
    )
    status, out, err = await node.tessera("bpf", "verify", "-o", "json")
    assert status == 1, err
    found = {
        (d["table"], d["key"]): (d["wanted"], d["found"]) for d in json.loads(out)["differences"]
    }
    assert found["policy_peer", f"slot {slot}, identity {client.identity}"][1] == ""
    assert found["policy_peer", f"slot {slot}, identity 4242"][0] == ""
    assert found["ipcache4", "10.1.2.3"] == ("", "identity 4242")
    assert ("programs", node.web["interface"]) in found
    assert len(found) == 4

    status, _, err = await node.tessera("bpf", "verify", "--repair")
    assert status == 0
    assert "repaired" in err
    assert tables.policy_peer.get(client) == row
    tables.close()
    status, out, _ = await node.tessera("bpf", "verify")
    assert (status, out.endswith("all as wanted\n")) == (0, True)
    with node.web_ns.listen(80):
        assert await node.reach()
        assert not await node.reach(81)


async def test_without_an_agent_the_kernel_is_read_and_checked_against_itself(
    tmp_path: Path, spaces: tuple[Namespace, Namespace]
) -> None:
    needs_kernel()
    built_object()
    async with control_plane() as plane:
        config = config_for(tmp_path, plane.target)
        try:
            async with running(config) as agent:
                body = {"namespace": "shop", "name": "web", "netns": spaces[0].path}
                _, web = await agent.post(**body)
                policy = LocalPolicy(web["identity"], True, False, (), (WEB,), ())
                revision = plane.policies.set_policy(policy)
                await until(
                    lambda: bool(acks := plane.policies.acks) and acks[-1].revision >= revision
                )
            status, out, err = await asyncio.to_thread(run, config, "bpf", "verify")
            assert (status, out) == (0, "the tables agree with each other\n")
            assert "does not answer" in err
            _, out, _ = await asyncio.to_thread(
                run, config, "bpf", "endpoint", "list", "-o", "json"
            )
            assert json.loads(out)["address"] == web["ip"]
            slot = json.loads(out)["slot_in"]
            agent.tables.policy_peer.delete_many([PolicyPeerKey(slot, 0)])
            status, out, _ = await asyncio.to_thread(run, config, "bpf", "verify")
            assert status == 1
            assert f"slot {slot}" in out
        finally:
            unpin(config)
            await asyncio.to_thread(links.delete_veth, web["interface"])


async def test_no_maps_is_one_line_that_says_so(tmp_path: Path) -> None:
    needs_kernel()
    config = config_for(tmp_path, "127.0.0.1:1")
    for words in (("bpf", "ct", "list"), ("bpf", "verify")):
        status, out, err = await asyncio.to_thread(run, config, *words)
        assert (status, out) == (1, "")
        assert f"no BPF map at {config.bpf_dir}" in err
        assert "the agent has not run here" in err


async def test_cleanup_leaves_no_trace_and_says_what_it_took(
    tmp_path: Path, spaces: tuple[Namespace, Namespace]
) -> None:
    needs_kernel()
    built_object()
    async with control_plane() as plane:
        config = config_for(tmp_path, plane.target)
        file = tmp_path / "node.toml"
        keys = ("node_name", "node_ip", "state_dir", "run_dir", "bpf_dir", "identityd", "ipamd")
        lines = [f'{key} = "{getattr(config, key)}"' for key in keys]
        file.write_text("\n".join(["[agent]", *lines]))
        words = ("agent", "--cleanup", "--config", str(file))
        async with running(config) as agent:
            for name, space in zip(("client", "web"), spaces, strict=True):
                _, made = await agent.post(namespace="shop", name=name, netns=space.path)
            status, _, err = await asyncio.to_thread(run, config, *words)
            assert status == 1
            assert "another agent runs here" in err
        plane.identities.away = True
        status, _, err = await asyncio.to_thread(run, config, *words)
        assert status == 1
        assert "still allocated: run this again" in err
        plane.identities.away = False
        status, out, err = await asyncio.to_thread(run, config, *words)
        assert status == 0, err
        assert "addresses and identities of 2 endpoints, given back" in out
        assert made["interface"] not in links.list_outer("tes")
        assert left_in(config) == []
        assert not plane.addresses.owners
        assert not plane.identities.references
        status, out, _ = await asyncio.to_thread(run, config, *words)
        assert (status, out) == (0, "nothing of an agent was found here\n")
