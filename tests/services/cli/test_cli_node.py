"""The whole product on this machine: real etcd, real processes, real packets."""

import json
import os
import shutil
import signal
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
