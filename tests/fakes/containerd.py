"""containerd as Kubernetes' kubelet uses it: pod sandboxes over CRI, on an image made here.

The few CRI messages needed are encoded by hand (runtime/v1/api.proto of Kubernetes): no package on
PyPI or in Debian has their stubs.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from tests.fakes.libcni import STANDARD_PLUGINS

BUSYBOX = Path("/bin/busybox")
IMAGE = "localhost/tessera-pause:test"
DEADLINE_S = 60.0
CONFIG = """\
version = 2
root = "{root}/root"
state = "{root}/state"
[grpc]
address = "{root}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{root}/plugins"
conf_dir = "{root}/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _first_text(message: bytes) -> str:
    """Field 1 of an answer that has a text there; short enough for one byte of length."""
    assert message[0] == 1 << 3 | 2
    return message[2 : 2 + message[1]].decode()


class Containerd:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.plugins, self.networks = root / "plugins", root / "net.d"
        self.pods: dict[str, str] = {}
        self._channel = grpc.insecure_channel(f"unix://{root}/containerd.sock")

    def _call(self, method: str, request: bytes) -> bytes:
        call = self._channel.unary_unary(f"/runtime.v1.RuntimeService/{method}")
        answer: bytes = call(request, timeout=DEADLINE_S, wait_for_ready=True)
        return answer

    def version(self) -> bytes:
        return self._call("Version", b"")

    def run_pod(self, namespace: str, name: str, annotations: Mapping[str, str]) -> None:
        metadata = _field(1, name) + _field(2, f"uid-{name}") + _field(3, namespace)
        pairs = (_field(1, key) + _field(2, value) for key, value in annotations.items())
        config = _field(1, metadata) + _field(2, name) + _field(3, str(self.root / "log"))
        config += b"".join(_field(7, pair) for pair in pairs) + _field(8, b"")
        self.pods[name] = _first_text(self._call("RunPodSandbox", _field(1, config)))

    def remove_pod(self, name: str) -> None:
        request = _field(1, self.pods.pop(name))
        self._call("StopPodSandbox", request)
        self._call("RemovePodSandbox", request)

    def close(self) -> None:
        for name in list(self.pods):
            self.remove_pod(name)
        self._channel.close()


@contextmanager
def containerd(root: Path) -> Iterator[Containerd]:
    """Skips where there is none. Networks must be in its folder before a pod is run."""
    for program in ("containerd", "ctr", "runc"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} (Debian: containerd, runc)")
    loopback = Path(STANDARD_PLUGINS, "loopback")
    if not BUSYBOX.exists() or not loopback.exists():
        pytest.skip("no busybox-static or containernetworking-plugins")
    made = Containerd(root)
    for folder in (made.plugins, made.networks, root / "log"):
        folder.mkdir(parents=True)
    (made.plugins / "loopback").symlink_to(loopback)  # containerd brings lo up by it
    config = root / "config.toml"
    config.write_text(CONFIG.format(root=root, image=IMAGE))
    with (root / "containerd.log").open("wb") as log:
        daemon = subprocess.Popen(["containerd", "--config", config], stdout=log, stderr=log)
    try:
        made.version()
        _import(root)
        yield made
        made.close()
    finally:
        daemon.terminate()
        daemon.wait(20)
        _unmount(root)


def _import(root: Path) -> None:
    archive = root / "image.tar"
    archive.write_bytes(_image())
    command = ["ctr", "--address", root / "containerd.sock", "--namespace", "k8s.io"]
    words = [*command, "images", "import", "--snapshotter", "native", archive]
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr


def _unmount(root: Path) -> None:
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in reversed([one for one in mounts if one.startswith(str(root))]):
        subprocess.run(["umount", "-l", mount], check=True)


def _image() -> bytes:
    """`docker save` of one layer: busybox, asleep."""
    layer = _tar({"bin/busybox": BUSYBOX.read_bytes()})
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/bin/busybox", "sleep", "100000"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    return _tar(
        {
            "layer.tar": layer,
            "config.json": json.dumps(config).encode(),
            "manifest.json": json.dumps(manifest).encode(),
        }
    )


def _tar(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()
