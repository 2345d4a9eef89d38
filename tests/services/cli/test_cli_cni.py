"""`tessera cni` on folders of its own."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.cli import conflist, main
from tests.fakes.http_door import http_door


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: bytes
    stderr: bytes


def tessera(*words: object) -> Done:
    """In this process: what is tested here is files, and an interpreter costs more than all."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["tessera", *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main.main()
    except SystemExit as exit_:
        code = exit_.code
    finally:
        sys.argv = before
    assert isinstance(code, int)
    return Done(code, out.getvalue().encode(), err.getvalue().encode())


class Folders:
    def __init__(self, root: Path) -> None:
        self.bin, self.conf = root / "bin", root / "net.d"
        self.socket = root / "agent.sock"

    def run(self, verb: str, *more: str) -> Done:
        where = ("--bin-dir", self.bin, "--conf-dir", self.conf, "--agent-socket", self.socket)
        return tessera("cni", verb, *where, *more)

    def network(self, file: str = "10-tessera.conflist"):
        return json.loads((self.conf / file).read_bytes())

    def foreign(self, file: str, name: str = "other", **plugin: str) -> None:
        self.conf.mkdir(exist_ok=True)
        document = {"name": name, "plugins": [{"type": "bridge"} | plugin]}
        (self.conf / file).write_text(json.dumps(document))


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def test_what_is_installed_is_a_plugin_and_a_network(folders: Folders) -> None:
    done = folders.run("install", "--mtu", "1400", "--namespace", "shop", "-l", "app=web")
    assert done.returncode == 0, done.stderr
    ours = folders.network()["plugins"][0]
    assert (ours["type"], ours["mtu"], ours["namespace"]) == ("tessera", 1400, "shop")
    assert ours["labels"] == {"app": "web"}
    version = subprocess.run(
        [folders.bin / "tessera"], env={"CNI_COMMAND": "VERSION"}, input=b"{}", capture_output=True
    )
    assert "1.1.0" in json.loads(version.stdout)["supportedVersions"]
    assert str(folders.socket) in (folders.bin / "tessera").read_text()
    assert sorted(path.name for path in folders.conf.iterdir()) == ["10-tessera.conflist"]


def test_a_chain_is_what_was_asked_for(folders: Folders) -> None:
    done = folders.run("install", "--chain", "bandwidth", "--chain", "no-such-plugin")
    assert done.returncode == 0
    assert b"no-such-plugin is in none of" in done.stderr
    chained = folders.network()["plugins"][1:]
    assert chained == [
        {"type": "bandwidth", "capabilities": {"bandwidth": True}},
        {"type": "no-such-plugin"},
    ]


def test_installing_again_brings_both_up_to_date(folders: Folders) -> None:
    folders.run("install")
    (folders.bin / "tessera").write_text("old")
    assert folders.run("install", "--mtu", "1400").returncode == 0
    assert folders.network()["plugins"][0]["mtu"] == 1400
    assert (folders.bin / "tessera").read_text().startswith("#!/usr/bin/python3")


@pytest.mark.parametrize(
    ("file", "name", "words"),
    [
        ("05-other.conflist", "other", "comes before"),
        ("90-other.conflist", "tessera", "podman would find two"),
        ("10-tessera.conflist", "tessera", "somebody else's (bridge)"),
    ],
)
def test_a_network_in_its_way_is_pointed_out_and_nothing_is_written(
    folders: Folders, file: str, name: str, words: str
) -> None:
    folders.foreign(file, name)
    before = (folders.conf / file).read_bytes()
    done = folders.run("install")
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert words in done.stderr.decode()
    assert file in done.stderr.decode()
    assert [path.read_bytes() for path in folders.conf.iterdir()] == [before]
    assert not folders.bin.exists()
    assert folders.run("install", "--force").returncode == 0


def test_networks_after_it_and_of_its_own_are_in_nobodys_way(folders: Folders) -> None:
    folders.foreign("87-podman.conflist")
    assert folders.run("install", "--file", "10-a.conflist", "--network", "a").returncode == 0
    done = folders.run("install", "--file", "20-b.conflist", "--network", "b")
    assert (done.returncode, done.stderr.count(b"before")) == (0, 0)


def test_uninstalling_takes_away_its_own_files_only(folders: Folders) -> None:
    folders.run("install")
    folders.foreign("87-podman.conflist")
    assert folders.run("uninstall", "--force").returncode == 0
    assert [path.name for path in folders.conf.iterdir()] == ["87-podman.conflist"]
    assert list(folders.bin.iterdir()) == []


def test_the_plugin_stays_while_containers_need_it(folders: Folders) -> None:
    endpoint = {"id": 1, "namespace": "shop", "name": "a", "ip": "10.0.0.1", "identity": 300}
    body = json.dumps({"endpoints": [endpoint, endpoint | {"container": "c1"}]}).encode()
    folders.run("install")
    with http_door({("GET", "/v1/endpoints"): (200, body)}) as door:
        done = folders.run("uninstall", "--agent-socket", door.address)
    assert done.returncode == 1
    assert b"1 container interfaces are still to be deleted" in done.stderr
    assert (folders.bin / "tessera").exists()
    assert list(folders.conf.iterdir()) == []


def test_an_agent_that_does_not_answer_may_still_have_containers(folders: Folders) -> None:
    folders.run("install")
    done = folders.run("uninstall")
    assert done.returncode == 1
    assert b"--force" in done.stderr
    assert (folders.bin / "tessera").exists()


def test_status_names_each_thing_that_is_wrong(folders: Folders) -> None:
    done = folders.run("status")
    assert done.returncode == 1
    assert b"run `tessera cni install`" in done.stderr
    folders.run("install")
    (folders.bin / "tessera").write_text("#!/bin/sh\n")
    folders.foreign("05-other.conflist")
    folders.foreign("50-chained.conflist", "third", type="tessera")
    checks = json.loads(folders.run("status", "-o", "json").stdout)["checks"]
    states = {Path(check["what"]).name: check for check in checks}
    assert "install` again" in states["tessera"]["remedy"]
    assert "05-other.conflist comes before" in states["10-tessera.conflist"]["remedy"]


@pytest.mark.parametrize(
    "more", [("--file", "tessera"), ("--file", "a/b.conflist"), ("--label", "app")]
)
def test_what_no_runtime_would_read_is_refused(folders: Folders, more: tuple[str, ...]) -> None:
    done = folders.run("install", *more)
    assert done.returncode == 1
    assert not folders.conf.exists()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"plugins": 7}', b"\xff", b'{"plugins":[7]}']
)
def test_unreadable_configurations_are_nobodys(content: bytes) -> None:
    assert conflist.read("a.conf", content).types == ()
