"""The plugin itself, with an agent that is away, late, silent or broken."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from datapath.cni import forwarder
from datapath.cni.request import split
from datapath.cni.spec import SUPPORTED
from tests.fakes.libcni import FORWARDER, install_plugin, run_plugin

CONFIG = b'{"cniVersion": "0.4.0", "name": "pods", "type": "tessera"}'
REPLY = b"HTTP/1.0 %s\r\nContent-Type: application/json\r\n\r\n%s"


def answering(path: Path, reply: bytes, got: list[bytes]) -> threading.Thread:
    """One connection's worth of an agent."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def serve() -> None:
        with listener, listener.accept()[0] as peer:
            head, _, body = peer.recv(1 << 16).partition(b"\r\n\r\n")
            size = int(head.rsplit(b" ", 1)[1])
            while len(body) < size:
                body += peer.recv(1 << 16)
            got.append(body)
            peer.sendall(reply)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_it_hands_over_environment_and_input_and_prints_the_answer(tmp_path: Path) -> None:
    got: list[bytes] = []
    thread = answering(tmp_path / "a.sock", REPLY % (b"200 OK", b'{"ips": []}\n'), got)
    plugin = install_plugin(tmp_path, tmp_path / "a.sock")
    config = CONFIG + b" " * 200_000
    environ = {"CNI_COMMAND": "ADD", "CNI_ARGS": "a=b;c=d", "HOME": "/root"}
    assert run_plugin(plugin, environ, config) == (0, {"ips": []})
    thread.join()
    assert split(got[0]) == ({"CNI_COMMAND": "ADD", "CNI_ARGS": "a=b;c=d"}, config)


def test_an_error_result_ends_with_failure(tmp_path: Path) -> None:
    error = {"cniVersion": "1.0.0", "code": 7, "msg": "x"}
    reply = REPLY % (b"422 Unprocessable Entity", json.dumps(error).encode())
    thread = answering(tmp_path / "a.sock", reply, [])
    plugin = install_plugin(tmp_path, tmp_path / "a.sock")
    assert run_plugin(plugin, {"CNI_COMMAND": "ADD"}, CONFIG) == (1, error)
    thread.join()


@pytest.mark.parametrize("reply", [b"", REPLY % (b"500 Internal Server Error", b"500: oops")])
def test_an_agent_that_dies_or_fails_is_asked_again_later(tmp_path: Path, reply: bytes) -> None:
    thread = answering(tmp_path / "a.sock", reply, [])
    plugin = install_plugin(tmp_path, tmp_path / "a.sock")
    status, printed = run_plugin(plugin, {"CNI_COMMAND": "DEL"}, CONFIG)
    thread.join()
    assert (status, printed["code"], printed["cniVersion"]) == (1, 11, "0.4.0")


def test_it_waits_for_an_agent_that_is_just_starting(tmp_path: Path) -> None:
    plugin = install_plugin(tmp_path, tmp_path / "late.sock")
    waiting = subprocess.Popen(
        [plugin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"CNI_COMMAND": "ADD"}
    )
    assert waiting.stdin
    waiting.stdin.write(CONFIG)
    waiting.stdin.close()
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.3)
    thread = answering(tmp_path / "late.sock", REPLY % (b"200 OK", b"{}"), [])
    assert waiting.wait(20) == 0
    thread.join()
    assert waiting.stdout
    assert waiting.stdout.read() == b"{}"
    waiting.stdout.close()


@pytest.mark.parametrize(("command", "code"), [("ADD", 11), ("CHECK", 11), ("DEL", 11)])
def test_without_an_agent_the_runtime_is_told_to_try_again(
    tmp_path: Path, command: str, code: int
) -> None:
    plugin = install_plugin(tmp_path, tmp_path / "none.sock")
    plugin.write_text(plugin.read_text().replace("DEADLINE_S = 10", "DEADLINE_S = 0.3"))
    status, printed = run_plugin(plugin, {"CNI_COMMAND": command}, CONFIG)
    assert (status, printed["code"], printed["cniVersion"]) == (1, code, "0.4.0")
    assert "tessera up" in printed["msg"]


def test_without_an_agent_the_plugin_is_not_available_but_knows_its_versions(
    tmp_path: Path,
) -> None:
    plugin = install_plugin(tmp_path, tmp_path / "none.sock")
    started = time.perf_counter()
    assert run_plugin(plugin, {"CNI_COMMAND": "STATUS"}, CONFIG)[1]["code"] == 50
    status, printed = run_plugin(plugin, {"CNI_COMMAND": "VERSION"}, CONFIG)
    assert (status, printed) == (0, {"cniVersion": "0.4.0", "supportedVersions": list(SUPPORTED)})
    assert time.perf_counter() - started < forwarder.AGENT_DEADLINE_S


def test_it_loads_nothing_that_a_bare_interpreter_has_not() -> None:
    """Each module from a file would cost every container as much as the whole plugin does."""

    def modules(code: str) -> set[str]:
        listing = f"import sys\n{code}\nprint(*sys.modules)"
        words = ["/usr/bin/python3", "-ISE", "-c", listing]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    source = f"exec(compile(open({str(FORWARDER)!r}).read(), 'x', 'exec'), {{'__name__': 'x'}})"
    assert modules(source) - modules("") <= {"time", "_socket"}
