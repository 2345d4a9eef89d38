"""podman with CNI networks and runc, all of it in one folder, on a file system made here.

Debian's podman 4.3: netavark does not call CNI, and crun wants cgroups that virtual machines of CI
do not have.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.libcni import STANDARD_PLUGINS

BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "sleep", "httpd", "nc")
CONTAINERS_CONF = """\
[containers]
default_ulimits=["nofile=4096:4096","nproc=4096:4096"]
[network]
network_backend="cni"
cni_plugin_dirs=["{root}/plugins","{plugins}"]
network_config_dir="{root}/net.d"
[engine]
runtime="runc"
cgroup_manager="cgroupfs"
events_logger="file"
"""
# Options, not files: the clean-up that podman starts at a container's end is told these alone.
COMMAND = """\
#!/bin/sh
export CONTAINERS_CONF={root}/containers.conf
exec {podman} --root={root}/storage --runroot={root}/runroot --tmpdir={root}/tmp \\
    --storage-driver=vfs "$@"
"""
IMAGE = "tessera-test"
SLEEP = (IMAGE, "/bin/sleep", "1000")
DEADLINE_S = 60


class Podman:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.plugins, self.networks = root / "plugins", root / "net.d"
        self._names: list[str] = []

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.command, *words], capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert not check or done.returncode == 0, f"podman {' '.join(words)}: {done.stderr}"
        return done

    @property
    def command(self) -> Path:
        """podman for whoever shall see these containers."""
        return self.root / "bin" / "podman"

    def start(self, name: str, network: str, *command: str) -> None:
        self._names.append(name)
        self.run("run", "-d", "--name", name, "--network", network, IMAGE, *command)

    def remove(self, name: str) -> None:
        self._names.remove(name)
        self.run("rm", "-f", "-t", "0", name)

    def connects(self, name: str, address: str, port: int) -> bool:
        """By TCP, within a second. (wget of a static busybox wants more of a root than this.)"""
        words = ("exec", name, "/bin/nc", "-w", "1", address, str(port))
        return self.run(*words, check=False).returncode == 0

    def stop(self) -> None:
        for name in list(self._names):
            self.remove(name)


@contextmanager
def podman(root: Path) -> Iterator[Podman]:
    """Skips where containers cannot be started at all."""
    for program in ("podman", "runc"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} (Debian: podman, runc)")
    if not BUSYBOX.exists() or not Path(STANDARD_PLUGINS, "portmap").exists():
        pytest.skip("no busybox-static or containernetworking-plugins")
    made = Podman(root)
    for folder in (made.plugins, made.networks, made.command.parent):
        folder.mkdir(parents=True)
    made.command.write_text(COMMAND.format(root=root, podman=shutil.which("podman")))
    made.command.chmod(0o755)
    (root / "containers.conf").write_text(
        CONTAINERS_CONF.format(root=root, plugins=STANDARD_PLUGINS)
    )
    _import(made)
    probe = made.run("run", "-d", "--name", "probe", "--network", "none", *SLEEP, check=False)
    made.run("rm", "-f", "-t", "0", "probe")
    if probe.returncode:
        pytest.skip(f"podman cannot start a container here: {probe.stderr.strip()}")
    try:
        yield made
    finally:
        made.stop()


def _import(made: Podman) -> None:
    files = made.root / "files"
    (files / "bin").mkdir(parents=True)
    shutil.copy(BUSYBOX, files / "bin" / "busybox")
    for applet in APPLETS:
        (files / "bin" / applet).symlink_to("busybox")
    archive = made.root / "files.tar"
    subprocess.run(["tar", "-C", files, "-cf", archive, "."], check=True)
    made.run("import", str(archive), IMAGE)
