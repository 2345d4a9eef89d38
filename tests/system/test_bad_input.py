"""What a user can get wrong on a running node: one line that says what, and nothing half done."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from datapath.agent.record import outer_name
from services.cli import layout
from services.cli.manifests import MAX_BYTES
from services.runtime.errors import TesseraError
from tests.fakes.netns import Namespace, namespace
from tests.fakes.stack import Stack, eventually

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(180)]

POLICY = """apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api, namespace: shop}
spec: {endpointSelector: {matchLabels: {app: api}}, ingress: [{}]}
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
# What belongs to endpoints and policies; identities without a user stay until they are collected.
KEPT = (
    "cilium/state/ip/",
    "tessera/id/ref/",
    "tessera/ipam/ip/",
    "tessera/ipam/own/",
    "tessera/policy/object/",
)


@pytest.fixture(scope="module")
def calm() -> Iterator[Stack]:
    """For what leaves the processes alone."""
    made = Stack.start("input")
    yield made
    made.stop()


@pytest.fixture
def stack() -> Iterator[Stack]:
    """For what kills and fills."""
    made = Stack.start("harm", {"etcd": {"request_timeout_s": 1.0}})
    yield made
    made.stop()


@pytest.fixture
def room() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


def tessera(stack: Stack, *arguments: object, stdin: bytes = b"") -> tuple[int, bytes, str]:
    environ = {
        **os.environ,
        "TESSERA_SERVER": stack.rest.address,
        "TESSERA_AGENT_SOCKET": stack.agent.address,
    }
    done = subprocess.run(
        [sys.executable, "-m", "services.cli.main", *map(str, arguments)],
        input=stdin, capture_output=True, env=environ, check=False, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr.decode()


def refusal(stack: Stack, *arguments: object, stdin: bytes = b"") -> str:
    """The one line."""
    status, output, line = tessera(stack, *arguments, stdin=stdin)
    assert status == 1, line
    assert output == b""
    assert line.count("\n") == 1, line
    assert "Traceback" not in line
    return line


def add(stack: Stack, room: Namespace, *options: str, name: str = "shop/api") -> str:
    return refusal(stack, "endpoint", "add", name, "--netns", room.name, *options)


def traces(stack: Stack, name: str = "api") -> dict[str, object]:
    outer = outer_name(stack.name, "shop", name)
    report = json.loads(stack.agent.get("/v1/status"))
    pins = sorted(path.name for path in stack.bpf_dir.rglob("*") if outer in path.name)
    return {
        "keys": [key for prefix in KEPT for key in stack.etcd_keys(prefix)],
        "endpoints": report["endpoints"],
        "rows": report["policy"]["peer_rows"],
        "pins": pins,
        "interface": outer in dict(map(reversed, socket.if_nameindex())),
    }


def nothing_left(stack: Stack, room: Namespace) -> None:
    clean = {"keys": [], "endpoints": {}, "rows": 0, "pins": [], "interface": False}

    def gone() -> bool:
        try:
            return traces(stack) == clean
        except (TesseraError, OSError):
            return False

    try:
        eventually(gone, "something is left", 40.0)
    except AssertionError:
        assert traces(stack) == clean
    assert room.ip("-br link").split()[0] == "lo"
    assert len(room.ip("-br link").splitlines()) == 1


# ------------------------------------------------------------------ manifests


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a: [b\n c: }", "not valid YAML"),
        (POLICY.replace("ingress", "ingres").encode(), "did you mean 'ingress'"),
        (POLICY.replace("CiliumNetworkPolicy", "Pod").encode(), "kind 'Pod' is not known"),
        (POLICY.replace("CiliumNetworkPolicy", "[1]").encode(), "must be a string, not a list"),
        (BOMB.encode(), "aliases add more than"),
        (bytes(range(256)) * 100, "not UTF-8 text"),
        (bytes(100), "not valid YAML"),
        (b"", "no policy in it"),
        (b"# nothing\n", "no policy in it"),
        (b"- " * 400_000, "deep"),
    ],
    ids=["broken", "field", "kind", "list", "bomb", "binary", "zeros", "empty", "comment", "deep"],
)
def test_a_bad_manifest_is_one_line_with_its_place(calm: Stack, text: bytes, words: str) -> None:
    line = refusal(calm, "policy", "apply", "-f", "-", stdin=text)
    assert words in line
    assert line.startswith("stdin:")
    assert "nothing was applied" in line
    assert calm.etcd_keys("tessera/policy/object/") == []


@pytest.mark.parametrize("size", [2 << 20, 50 << 20])
def test_a_huge_file_is_refused_by_its_name(calm: Stack, tmp_path: Path, size: int) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.write(POLICY.encode())
        file.truncate(size)
    assert f"{path} is larger than the 1 MiB" in refusal(calm, "policy", "apply", "-f", path)


def test_a_file_without_end_is_refused(calm: Stack) -> None:
    assert "/dev/zero is larger" in refusal(calm, "policy", "apply", "-f", "/dev/zero")


def test_a_server_takes_no_more_than_the_command_sends(calm: Stack) -> None:
    text = POLICY.encode() + b"#" * MAX_BYTES
    reply = calm.rest.exchange("POST", "/v1/policies", {"source": "x"}, text)
    assert reply.status == 422
    assert b"at most 1048576 at once" in reply.body


def test_the_last_of_many_files_refused_leaves_none_applied(calm: Stack, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(POLICY.replace("name: api", f"name: {name}"))
    (tmp_path / "c.yaml").write_text(POLICY.replace("ingress", "ingres"))
    status, output, lines = tessera(calm, "policy", "apply", "-f", tmp_path)
    assert (status, output) == (1, b"")
    assert f"{tmp_path}/c.yaml:4:" in lines
    assert lines.endswith("nothing was applied; correct the lines above\n")
    assert calm.etcd_keys("tessera/policy/object/") == []


def test_paths_that_hold_no_manifest_are_named(calm: Stack, tmp_path: Path) -> None:
    assert f"directory {tmp_path} holds no manifest" in refusal(
        calm, "policy", "apply", "-f", tmp_path
    )
    missing = tmp_path / "missing.yaml"
    assert f"cannot read {missing}" in refusal(calm, "policy", "apply", "-f", missing)


# ------------------------------------------------------------------ endpoints


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-l", "=x"], "is not source:key=value"),
        (["-l", "app=a b"], "could not be selected by a policy"),
        (["-l", "app=1", "-l", "app=2"], "given twice"),
        (["-l", "reserved:host"], "reserved"),
        (["-l", "app=a\nb"], "could not be selected"),
        (["-l", "io.kubernetes.pod.namespace=bank"], "names another namespace"),
        (["--interface", "a/b"], "is no interface name"),
        (["--interface", "sixteen-letters-"], "is no interface name"),
        (["--interface", "lo"], "has an interface lo already"),
    ],
)
def test_an_endpoint_nobody_could_make_leaves_nothing(
    calm: Stack, room: Namespace, options: list[str], words: str
) -> None:
    assert words in add(calm, room, *options)
    nothing_left(calm, room)


@pytest.mark.parametrize(
    ("netns", "words"),
    [
        ("nowhere", "no network namespace nowhere"),
        ("../../etc", "neither a name"),
        ("/etc/passwd", "is no network namespace"),
        ("/proc/self/ns/net", "the host's own"),
        ("", "netns ''"),
    ],
)
def test_what_is_no_namespace_of_a_workload_is_refused(
    calm: Stack, room: Namespace, netns: str, words: str
) -> None:
    assert words in refusal(calm, "endpoint", "add", "shop/api", "--netns", netns)
    nothing_left(calm, room)


def test_taken_names_and_interfaces_are_said_to_be_taken(calm: Stack, room: Namespace) -> None:
    room.ip("link add eth0 type veth peer name eth9")
    assert "has an interface eth0 already" in add(calm, room)
    room.ip("link del eth0")
    calm.add(room, "api", app="api")
    try:
        assert "exists already" in add(calm, room, "--interface", "eth1")
        assert "belongs to endpoint shop/api" in add(calm, room, name="shop/other")
    finally:
        calm.remove("api")
    nothing_left(calm, room)


@pytest.mark.parametrize("ref", ["99", "shop/nobody", "a b", "../status", "%2e"])
def test_an_endpoint_that_is_not_there_is_named(calm: Stack, ref: str) -> None:
    assert f"no endpoint {ref} on this node" in refusal(calm, "endpoint", "delete", ref)


# ------------------------------------------------------------------ a store in trouble


def test_a_store_that_stands_still_is_one_line_and_leaves_nothing(
    stack: Stack, room: Namespace
) -> None:
    stack.signal("etcd", signal.SIGSTOP)
    try:
        line = refusal(stack, "policy", "apply", "-f", "-", stdin=POLICY.encode())
        assert "etcd" in line
        assert "apply it again" in line
        assert add(stack, room)
    finally:
        stack.signal("etcd", signal.SIGCONT)
    # The write waited in etcd's socket and may have been done since; asking again settles it.
    stack.apply(POLICY)
    stack.withdraw("CiliumNetworkPolicy", "shop", "api")
    nothing_left(stack, room)


def test_a_store_that_is_gone_is_one_line_and_leaves_nothing(stack: Stack, room: Namespace) -> None:
    stack.kill("etcd")
    assert "etcd" in refusal(stack, "policy", "apply", "-f", "-", stdin=POLICY.encode())
    assert "etcd" in add(stack, room)
    stack.start_etcd()
    nothing_left(stack, room)


def test_a_store_that_is_full_says_so_and_endpoints_still_come_and_go(
    stack: Stack, room: Namespace
) -> None:
    stack.kill("etcd")
    stack.start_etcd({"quota-backend-bytes": "16384"})
    stack.wait_ready()

    def applied_in_vain() -> bool:
        line = refusal(stack, "policy", "apply", "-f", "-", stdin=POLICY.encode())
        return "etcd" in line and "out of space" in line

    eventually(applied_in_vain, "it does not say that etcd is full")
    # etcd counts no nested transaction against its quota, and the address is of the node's window.
    stack.add(room, "api", app="api")
    stack.kill("etcd")
    stack.start_etcd()
    disarm(stack)
    stack.remove("api")
    nothing_left(stack, room)


def disarm(stack: Stack) -> None:
    """What an operator does after making room: etcdctl alarm disarm."""
    body = json.dumps({"action": "DEACTIVATE", "alarm": "NOSPACE"}).encode()
    url = f"http://127.0.0.1:{stack.etcd_port}/v3/maintenance/alarm"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=5) as reply:
        assert reply.status == 200


# ------------------------------------------------------------------ services that are not there


@pytest.mark.parametrize("name", ["identityd", "policyd"])
def test_an_endpoint_without_a_service_names_it_and_leaves_nothing(
    stack: Stack, room: Namespace, name: str
) -> None:
    stack.kill(name)
    line = add(stack, room)
    assert name in line or "policy" in line
    status, _, notes = tessera(stack, "status")
    assert status == 1
    assert f"{name} is not well" in notes
    stack.start_process(name)
    stack.wait_ready()
    nothing_left(stack, room)
    stack.add(room, "api", app="api")


def test_an_endpoint_has_its_address_without_ipamd(stack: Stack, room: Namespace) -> None:
    """Out of the node's own window; ipamd is told when it is back."""
    kept = stack.layout.state_dir / "addresses.log"
    eventually(lambda: b"Gained" in kept.read_bytes(), "the node has no window")
    stack.kill("ipamd")
    stack.add(room, "api", app="api")
    told = stack.etcd_keys("tessera/ipam/own/")
    stack.start_process("ipamd")
    stack.wait_ready()
    eventually(lambda: len(stack.etcd_keys("tessera/ipam/own/")) > len(told), "ipamd was not told")


def test_a_policy_without_policyd_names_it_and_is_not_stored(stack: Stack) -> None:
    stack.kill("policyd")
    line = refusal(stack, "policy", "apply", "--wait", "-f", "-", stdin=POLICY.encode())
    assert "policyd" in line
    assert stack.etcd_keys("tessera/policy/object/") == []


# ------------------------------------------------------------------ a state folder that is full


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for a megabyte."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_refuses_endpoints_and_keeps_those_there(
    small: Path, stack: Stack, room: Namespace
) -> None:
    restart_agent(stack, state_dir=str(small))
    with namespace() as other:
        stack.add(other, "old", app="old")
        fill(small / "filler")
        line = add(stack, room)
        assert "No space left" in line
        assert str(small) in line
        assert [one["name"] for one in stack.endpoints()] == ["old"]
        assert len(room.ip("-br link").splitlines()) == 1
        assert stack.processes["agent"].poll() is None
        (small / "filler").unlink()
        stack.add(room, "api", app="api")
    stack.kill("agent")


def restart_agent(stack: Stack, **changes: str) -> None:
    stack.kill("agent")
    tables = tomllib.loads(stack.layout.config_file.read_text())
    tables["agent"].update(changes)
    stack.layout.config_file.write_text(layout.dump(tables))
    stack.start_process("agent")
    stack.wait_ready()


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
