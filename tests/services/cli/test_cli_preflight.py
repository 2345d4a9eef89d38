import socket

import pytest

from services.cli import preflight
from services.runtime.errors import Unusable


def test_a_second_holder_of_the_lock_is_told_who_has_it(tmp_path):
    lock = tmp_path / "up.lock"
    with (
        preflight.only_one(lock, "a node"),
        pytest.raises(Unusable, match=r"a node already runs here \(process \d+"),
        preflight.only_one(lock, "a node"),
    ):
        pytest.fail("two holders")
    with preflight.only_one(lock, "a node"):
        pass


def test_a_busy_port_is_named_with_what_needs_it():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        with pytest.raises(Unusable, match=f"{address} is needed for apid.*in use"):
            preflight.require_ports({address: "apid"})
    preflight.require_ports({address: "apid"})


def test_sockets_and_switched_off_listeners_need_no_port():
    preflight.require_ports({"": "metrics", "unix:///run/x.sock": "policyd"})


def test_a_directory_on_an_ordinary_filesystem_is_no_place_for_pins(tmp_path):
    with pytest.raises(Unusable, match="not in a bpf filesystem"):
        preflight.require_bpffs(tmp_path)


def test_the_deepest_and_latest_mount_decides(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "none / ext4 rw 0 0\nbpf /sys/fs/bpf bpf rw 0 0\nx /mnt bpf rw 0 0\nx /mnt tmpfs rw 0 0\n"
    )
    assert preflight.require_bpffs(preflight.BPFFS / "tessera", mounts) is False
    with pytest.raises(Unusable, match="not in a bpf filesystem"):
        preflight.require_bpffs(tmp_path / "mnt", mounts)
