"""The whole product on this machine: real etcd, real processes, real packets."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from services.cli.demo import scenario
from services.cli.demo.netns import NETNS_DIR, PREFIX

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0, reason="a node needs root"),
    pytest.mark.skipif(shutil.which("etcd") is None, reason="a node needs etcd"),
]

TESSERA = (sys.executable, "-m", "services.cli.main")
BPFFS = Path("/sys/fs/bpf")


def _traces() -> set[str]:
    """What a demo must not leave behind."""
    names = NETNS_DIR.iterdir() if NETNS_DIR.is_dir() else ()
    spaces = {path.name for path in names if path.name.startswith(PREFIX)}
    pins = {path.name for path in BPFFS.iterdir() if path.name.startswith("tessera-demo-")}
    return spaces | pins


def _environ() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("TESSERA_")}


def test_the_demo_meets_every_expectation_and_leaves_nothing_behind():
    done = subprocess.run(
        [*TESSERA, "demo", "--isolated", "-o", "json"],
        capture_output=True, text=True, timeout=150, env=_environ(), check=False,
    )  # fmt: skip
    report = json.loads(done.stdout or '{"probes": []}')
    wrong = [one for one in report["probes"] if one["seen"] != one["expected"] or not one["rule"]]
    assert (done.returncode, wrong) == (0, []), done.stderr
    assert len(report["probes"]) == len(scenario.PROBES) + 2
    assert _traces() == set()


def test_an_interrupted_demo_takes_everything_down():
    demo = subprocess.Popen(
        [*TESSERA, "demo", "--isolated"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environ(),
    )  # fmt: skip
    for line in demo.stderr:
        if "endpoints are ready" in line:
            break
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert _traces() == set()


@pytest.fixture
def node(tmp_path):
    """A running `tessera up` of its own directories and ports; the environment to reach it by."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    pins = BPFFS / f"tessera-test-{os.getpid()}"
    quiet = "".join(
        f'[{name}]\nmetrics_listen = ""\n' for name in ("identityd", "policyd", "ipamd")
    )
    (tmp_path / "tessera.toml").write_text(
        f'[apid]\nlisten = "{listen}"\n{quiet}'
        '[ipamd.pools.default]\ncidrs = ["10.233.0.0/16"]\n'
        f'[agent]\nmetrics_listen = ""\nbpf_dir = "{pins}"\n'
    )
    environ = _environ() | {
        "TESSERA_SERVER": f"http://{listen}",
        "TESSERA_AGENT_SOCKET": str(tmp_path / "run" / "agent.sock"),
    }
    up = subprocess.Popen(
        [*TESSERA, "up", "--cleanup", "--etcd-port", "0", "--config", tmp_path / "tessera.toml",
         "--state-dir", tmp_path / "state", "--run-dir", tmp_path / "run"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ,
    )  # fmt: skip
    said = []
    for line in up.stdout:
        said.append(line)
        if "press Ctrl-C" in line:
            break
    try:
        assert up.poll() is None, "".join(said)
        yield environ
    finally:
        up.send_signal(signal.SIGTERM)
        up.communicate(timeout=60)
    assert up.returncode == 0
    assert not pins.exists()


def tessera(environ, *arguments):
    return subprocess.run(
        [*TESSERA, *arguments],
        capture_output=True, text=True, timeout=150, env=environ, check=False,
    )  # fmt: skip


def test_what_a_demo_kept_is_removed_by_the_next_and_nothing_else_is_touched(node):
    kept = tessera(node, "demo", "--keep")
    assert kept.returncode == 0, kept.stderr
    listed = json.loads(tessera(node, "endpoint", "list", "-o", "json").stdout)
    assert len(listed["endpoints"]) == len(scenario.WORKLOADS)
    assert tessera(node, "demo").returncode == 0
    assert json.loads(tessera(node, "policy", "get", "-o", "json").stdout)["policies"] == []

    text = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: mine}\n"
    text += "spec: {endpointSelector: {}, ingress: [{}]}\n"
    applied = subprocess.run(
        [*TESSERA, "policy", "apply", "--wait", "-f", "-"],
        input=text, capture_output=True, text=True, env=node, check=False,
    )  # fmt: skip
    assert "1 of 1 nodes realised revision" in applied.stdout, applied.stderr
    refused = tessera(node, "demo")
    assert refused.returncode == 1
    assert "CiliumNetworkPolicy default/mine is not the demo's" in refused.stderr
    assert len(json.loads(tessera(node, "policy", "get", "-o", "json").stdout)["policies"]) == 1
