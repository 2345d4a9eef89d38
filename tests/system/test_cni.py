"""Containers by CNI on a whole node: the plugin as runtimes run it, packets between what it made.

A runtime's own order of calls is tests/fakes/libcni.py; real runtimes have files of their own.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from datapath.agent.record import OUTER_PREFIX
from datapath.links import has_carrier
from datapath.maps.tables import Tables
from identity.keys import IP_PREFIX, REF_PREFIX
from ipam.keys import ADDRESSES, OWNERS
from services.runtime.errors import Invalid
from tests.fakes.libcni import (
    STANDARD_PLUGINS,
    PluginFailed,
    Runtime,
    install_plugin,
)
from tests.fakes.netns import Namespace, namespace
from tests.fakes.stack import POOL, Stack, eventually

pytestmark = pytest.mark.kernel

LET_IN = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: db}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: web}}]
    toPorts: [{ports: [{port: "5432", protocol: TCP}]}]
"""

FROM_INSIDE = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: inside, namespace: shop}
spec:
  endpointSelector: {}
  ingress:
  - fromEndpoints: [{}]
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    labels = {"labels_dir": str(tmp_path_factory.mktemp("labels"))}
    pools = {"pools": {"default": {"cidrs": [POOL, "fd00:241::/112"]}}}
    made = Stack.start("cni", {"agent": labels, "ipamd": pools})
    yield made
    made.stop()


@pytest.fixture(scope="module")
def plugins(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("plugins")
    install_plugin(folder, stack.layout.socket("agent"))
    return [str(folder), STANDARD_PLUGINS]


@pytest.fixture
def runtime(stack: Stack, plugins: list[str]) -> Iterator[Runtime]:
    made = network(plugins)
    yield made
    for container, ifname in list(made.results):
        made.delete(container, ifname=ifname)
    assert nothing_left(stack)


def network(plugins: list[str], version: str = "1.1.0", *chained, **config) -> Runtime:
    ours = {"type": "tessera", "namespace": "shop", "capabilities": {"labels": True}} | config
    conflist = {"cniVersion": version, "name": "pods", "plugins": [ours, *chained]}
    return Runtime(conflist, plugins)


def named(name: str) -> str:
    return f"IgnoreUnknown=1;K8S_POD_NAME={name}"


def nothing_left(stack: Stack) -> bool:
    tables = Tables.pinned(stack.bpf_dir)
    try:
        assert stack.endpoints() == []
        assert not list(tables.endpoints.items())
        assert not list(tables.local4.items())
        assert not list(tables.local6.items())
    finally:
        tables.close()
    links = {name for _, name in socket.if_nameindex()} - stack.foreign_links
    assert not [name for name in links if name.startswith(OUTER_PREFIX)]
    assert not list((stack.bpf_dir / "links").glob("*"))
    assert not list((stack.bpf_dir / "filters").glob("*"))
    # Addresses, announcements and references of identities, as etcd has them.
    prefixes = (ADDRESSES, OWNERS, IP_PREFIX, REF_PREFIX)
    eventually(
        lambda: not any(stack.etcd_keys(prefix) for prefix in prefixes),
        f"left in etcd: {[key for prefix in prefixes for key in stack.etcd_keys(prefix)]}",
        10.0,
    )
    return True


def pair(runtime: Runtime, one: Namespace, two: Namespace) -> str:
    """web in `one`, db in `two`; the address of db."""
    runtime.add("c-web", one.path, args=named("web"), capabilities={"labels": {"app": "web"}})
    made = runtime.add("c-db", two.path, args=named("db"), capabilities={"labels": {"app": "db"}})
    return str(made["ips"][0]["address"].split("/")[0])


def test_policies_judge_what_a_runtime_added(stack: Stack, runtime: Runtime) -> None:
    with namespace() as web, namespace() as db:
        address = pair(runtime, web, db)
        stack.apply(LET_IN)
        with db.listen(5432), db.listen(5433):
            assert web.can_connect(address, 5432)
            assert not web.can_connect(address, 5433)

        def judged() -> bool:
            return {(5432, "FORWARDED", "db"), (5433, "DROPPED", "db")} <= {
                (flow["destination"]["port"], flow["verdict"], flow["destination"]["name"])
                for flow in stack.flows(namespace="shop", name="db", last="50")
            }

        eventually(judged, f"no such flows: {stack.flows(last='50')}")
        stack.withdraw("CiliumNetworkPolicy", "shop", "db")


def test_both_families_are_given_and_judged(stack: Stack, runtime: Runtime) -> None:
    with namespace() as web, namespace() as db:
        pair(runtime, web, db)
        made = runtime.results["c-db", "eth0"]
        four, six = (ip["address"].split("/")[0] for ip in made["ips"])
        assert [route["dst"] for route in made["routes"]] == ["0.0.0.0/0", "::/0"]
        runtime.check("c-db", db.path)
        stack.apply(LET_IN)
        with db.listen(5432), db.listen(5432, six), db.listen(5433, six):
            assert web.can_connect(four, 5432)
            assert web.can_connect(six, 5432)
            assert not web.can_connect(six, 5433)
        stack.withdraw("CiliumNetworkPolicy", "shop", "db")


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_a_container_lives_through_every_operation_of_its_version(
    stack: Stack, plugins: list[str], version: str
) -> None:
    runtime = network(plugins, version, mtu=1400, routes=[{"dst": "10.0.0.0/8"}])
    with namespace() as ns:
        if version == "1.1.0":
            runtime.status()
        made = runtime.add("c1", ns.path)
        assert made["cniVersion"] == version
        assert ("version" in made["ips"][0]) == (version < "1.0.0")
        host, inside = made["interfaces"]
        assert inside["sandbox"] == ns.path
        assert inside["mac"] in ns.ip("link show eth0")
        assert "mtu 1400" in ns.ip("link show eth0")
        assert made["ips"][0]["address"] in ns.ip("addr show eth0")
        assert "10.0.0.0/8 via 169.254.1.1" in ns.ip("route")
        assert "default" not in ns.ip("route")
        assert subprocess.run(["ip", "link", "show", host["name"]], check=False).returncode == 0
        if version > "0.3.1":
            runtime.check("c1", ns.path)
        if version == "1.1.0":
            runtime.gc([("c1", "eth0")])
            runtime.check("c1", ns.path)
        runtime.delete("c1", ns.path)
        assert nothing_left(stack)
        runtime.delete("c1", ns.path)
        runtime.delete("c1")


def test_an_address_that_is_asked_for_is_given_to_one_container(
    stack: Stack, runtime: Runtime
) -> None:
    wanted = named("a") + ";IP=10.241.9.9"
    with namespace() as one, namespace() as two:
        made = runtime.add("c1", one.path, args=wanted)
        assert made["ips"][0]["address"] == "10.241.9.9/32"
        with pytest.raises(PluginFailed, match=r"10\.241\.9\.9") as failed:
            runtime.add("c2", two.path, args=wanted.replace("=a;", "=b;"))
        assert failed.value.code in (7, 11)
        assert len(stack.endpoints()) == 1


def test_a_mac_that_is_asked_for_is_had_and_let_through(runtime: Runtime) -> None:
    with namespace() as one, namespace() as two:
        made = runtime.add("c1", one.path, args="MAC=02:00:5e:10:00:01;" + named("a"))
        assert made["interfaces"][1]["mac"] == "02:00:5e:10:00:01"
        assert "02:00:5e:10:00:01" in one.ip("link show eth0")
        runtime.check("c1", one.path, args=named("a"))
        other = runtime.add("c2", two.path)["ips"][0]["address"].split("/")[0]
        assert one.ping(other, timeout_s=2)


def test_adding_again_answers_the_same(stack: Stack, runtime: Runtime) -> None:
    with namespace() as ns:
        first = runtime.add("c1", ns.path)
        assert runtime.add("c1", ns.path) == first
        assert len(stack.endpoints()) == 1


def test_calls_for_one_container_at_once_agree(stack: Stack, runtime: Runtime) -> None:
    """A runtime that gave up waiting tries again while the first call is still at work."""
    with namespace() as ns:
        results: list[object] = []

        def add() -> None:
            results.append(runtime.add("c1", ns.path)["ips"])

        threads = [threading.Thread(target=add) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 6
        assert all(result == results[0] for result in results)
        deletions = [threading.Thread(target=runtime.delete, args=("c1",)) for _ in range(6)]
        for thread in deletions:
            thread.start()
        for thread in deletions:
            thread.join()
        assert nothing_left(stack)


def test_there_is_no_carrier_before_the_policy_is_in_force(stack: Stack, runtime: Runtime) -> None:
    results: list[object] = []

    def add() -> None:
        results.append(runtime.add("c1", ns.path, capabilities={"labels": {"app": "never-seen"}}))

    def outer() -> str:
        made = [one for one in stack.endpoints() if one["state"] == "creating"]
        return made[0]["interface"] if made and made[0]["ip"] else ""

    with namespace() as ns:
        stack.signal("policyd", signal.SIGSTOP)
        try:
            thread = threading.Thread(target=add)
            thread.start()
            name = eventually(outer, "no endpoint is being made")
            eventually(lambda: name in {n for _, n in socket.if_nameindex()}, "no interface")
            inside = ns.ip("link show eth0")
            assert thread.is_alive()
            assert not has_carrier(name)
            assert "state UP" not in inside
        finally:
            stack.signal("policyd", signal.SIGCONT)
        thread.join()
        assert has_carrier(name)
        assert len(results) == 1


def test_a_container_that_does_not_exist_needs_no_cleaning(runtime: Runtime) -> None:
    with pytest.raises(PluginFailed) as failed:
        runtime.add("c1", "/run/netns/no-such-namespace")
    assert failed.value.code == 3


def test_after_another_plugin_it_says_where_it_belongs(stack: Stack, runtime: Runtime) -> None:
    previous = {"cniVersion": "1.1.0", "interfaces": [{"name": "cni0"}], "ips": []}
    runtime.network["plugins"][0]["prevResult"] = previous
    with namespace() as ns, pytest.raises(PluginFailed, match="put it first") as failed:
        runtime.add("c1", ns.path)
    assert failed.value.code == 7
    assert stack.endpoints() == []


def broken(stack: Stack, ns: Namespace, what: str, host: str) -> None:
    tables = Tables.pinned(stack.bpf_dir)
    match what:
        case "address":
            ns.ip("addr flush dev eth0")
        case "route":
            ns.ip("route del default")
        case "carrier":
            subprocess.run(["ip", "link", "set", host, "down"], check=True)
        case "programs":
            subprocess.run(["tc", "qdisc", "del", "dev", host, "clsact"], check=True)
        case "row":
            tables.endpoints.delete_many([key for key, _ in tables.endpoints.items()])
        case "delivery":
            tables.local4.delete_many([key for key, _ in tables.local4.items()])
        case "interface":
            ns.ip("link set eth0 name eth9")
    tables.close()


@pytest.mark.parametrize(
    "what", ["address", "route", "carrier", "programs", "row", "delivery", "interface"]
)
def test_checking_finds_what_is_broken(runtime: Runtime, stack: Stack, what: str) -> None:
    with namespace() as ns:
        made = runtime.add("c1", ns.path)
        runtime.check("c1", ns.path)
        broken(stack, ns, what, made["interfaces"][0]["name"])
        with pytest.raises(PluginFailed) as failed:
            runtime.check("c1", ns.path)
        assert failed.value.code == 102
        runtime.delete("c1", ns.path)


def test_garbage_is_collected_for_this_network_alone(stack: Stack, plugins: list[str]) -> None:
    runtime, others = network(plugins), network(plugins)
    others.network["name"] = "others"
    with namespace() as one, namespace() as two, namespace() as three, namespace() as four:
        runtime.add("c1", one.path)
        runtime.add("c2", two.path)
        others.add("c3", three.path)
        stack.add(four, "by-hand")
        runtime.gc([("c2", "eth0")])
        assert sorted(e["name"] for e in stack.endpoints()) == ["by-hand", "c2", "c3"]
        stack.remove("by-hand")
        runtime.delete("c2")
        others.gc([])
        assert nothing_left(stack)


def test_a_namespace_that_vanished_is_cleared_without_a_deletion(
    stack: Stack, runtime: Runtime
) -> None:
    with namespace() as ns:
        runtime.add("c1", ns.path)
    eventually(lambda: stack.endpoints() == [], "the endpoint is still there")
    eventually(
        lambda: not [key for key in stack.etcd_keys("tessera/ipam/") if "/own/" in key],
        "its address is still held",
    )


def test_labels_come_from_a_file_beforehand(stack: Stack, runtime: Runtime) -> None:
    config = stack.layout.config_file.read_text()
    (line,) = [one for one in config.splitlines() if one.startswith("labels_dir")]
    folder = Path(json.loads(line.partition("=")[2])) / "shop"
    folder.mkdir()
    (folder / "web").write_text("app=web # the shop's\ntier = front\n")
    with namespace() as ns:
        runtime.add("c1", ns.path, args=named("web"))
        (made,) = stack.endpoints()
    assert {"k8s:app=web", "k8s:tier=front"} <= set(made["labels"])


def test_a_pod_is_init_until_its_labels_are_told(stack: Stack, runtime: Runtime) -> None:
    with namespace() as pod, namespace() as web:
        runtime.add("c-web", web.path, args=named("web"))
        made = runtime.add("c1", pod.path, args=f"K8S_POD_NAMESPACE=shop;{named('late')}")
        address = made["ips"][0]["address"].split("/")[0]
        (early,) = [one for one in stack.endpoints() if one["name"] == "late"]
        assert (early["identity"], early["labels"]) == (5, ["reserved:init"])
        with pod.listen(80):
            assert not web.can_connect(address, 80)
            body = json.dumps({"labels": ["k8s:app=late"]}).encode()
            answer = stack.agent.request("PUT", "/v1/endpoints/shop/late/labels", body=body)
            late = json.loads(answer)
            assert late["identity"] >= 256
            assert late["labels"] == ["k8s:app=late", "k8s:io.kubernetes.pod.namespace=shop"]
            assert web.can_connect(address, 80)
        runtime.check("c1", pod.path)
        runtime.delete("c1", pod.path)


def test_other_labels_leave_a_connection_that_is_still_allowed(
    stack: Stack, runtime: Runtime
) -> None:
    with namespace() as web, namespace() as db:
        address = pair(runtime, web, db)
        stack.apply(LET_IN)
        with db.listen(5432) as listener, web.connect(address, 5432) as client:
            server, _ = listener.accept()
            with server:
                for labels in (["k8s:app=web", "k8s:tier=x"], ["k8s:app=web"]):
                    stack.agent.request(
                        "PUT",
                        "/v1/endpoints/shop/web/labels",
                        body=json.dumps({"labels": labels}).encode(),
                    )
                    client.sendall(b"x")
                    server.settimeout(2)
                    assert server.recv(1) == b"x"
        stack.withdraw("CiliumNetworkPolicy", "shop", "db")


@pytest.mark.parametrize("label", ["app=late", "k8s:app=a b", "reserved:host"])
def test_labels_that_no_identity_can_have_are_refused_and_the_old_ones_stay(
    stack: Stack, runtime: Runtime, label: str
) -> None:
    with namespace() as ns:
        runtime.add("c1", ns.path, capabilities={"labels": {"app": "web"}})
        (before,) = stack.endpoints()
        body = json.dumps({"labels": [label]}).encode()
        with pytest.raises(Invalid):
            stack.agent.request("PUT", f"/v1/endpoints/{before['id']}/labels", body=body)
        assert stack.endpoints() == [before]


def test_tuning_and_portmap_follow_it_in_a_chain(stack: Stack, plugins: list[str]) -> None:
    if not Path(STANDARD_PLUGINS, "tuning").exists():
        pytest.skip("no standard CNI plugins (Debian: containernetworking-plugins)")
    tuning = {"type": "tuning", "sysctl": {"net.core.somaxconn": "321"}}
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    runtime = network(plugins, "1.0.0", tuning, portmap)
    ports = {"portMappings": [{"hostPort": 18080, "containerPort": 80, "protocol": "tcp"}]}
    with namespace() as ns, outside() as client:
        try:
            made = runtime.add("c1", ns.path, args=named("db"), capabilities=ports)
            assert made["ips"][0]["address"] in ns.ip("addr show eth0")
            assert ns.call(lambda: Path("/proc/sys/net/core/somaxconn").read_text()) == "321\n"
            # No CHECK: portmap 1.1.1 looks for rules of IPv6 where there is no such address.
            with ns.listen(80):
                assert client.can_connect("198.18.77.1", 18080, timeout_s=2)
                stack.apply(FROM_INSIDE)
                assert not client.can_connect("198.18.77.1", 18080)
                stack.withdraw("CiliumNetworkPolicy", "shop", "inside")
        finally:
            runtime.delete("c1", ns.path)  # portmap's rules, too, which are the machine's
        with pytest.raises(ConnectionRefusedError):
            client.can_connect("198.18.77.1", 18080)
        assert nothing_left(stack)


@contextmanager
def outside() -> Iterator[Namespace]:
    """A machine that reaches this node by the address 198.18.77.1."""
    with namespace() as space:
        for command in (
            f"link add tsrcniout type veth peer name eth0 netns {space.name}",
            "addr add 198.18.77.1/30 dev tsrcniout",
            "link set tsrcniout up",
        ):
            subprocess.run(["ip", *command.split()], check=True)
        space.ip("addr add 198.18.77.2/30 dev eth0")
        space.ip("link set eth0 up")
        yield space


def test_an_agent_killed_in_between_answers_the_same_when_it_is_back(
    stack: Stack, runtime: Runtime
) -> None:
    with namespace() as one, namespace() as two:
        first = runtime.add("c1", one.path)
        stack.kill("agent")
        late: list[object] = []
        waiting = threading.Thread(target=lambda: late.append(runtime.add("c2", two.path)))
        waiting.start()
        stack.start_process("agent")
        assert runtime.add("c1", one.path) == first
        runtime.check("c1", one.path)
        waiting.join()
        assert len(late) == 1
        stack.wait_ready()


def test_without_the_control_plane_it_is_not_available(stack: Stack, runtime: Runtime) -> None:
    runtime.status()
    stack.kill("policyd")

    def told() -> bool:
        try:
            runtime.status()
        except PluginFailed as failed:
            return failed.code == 50
        return False

    eventually(told, "STATUS says that all is well")
    stack.start_process("policyd")
    stack.wait_ready()
