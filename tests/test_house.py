"""What holds for the house as a whole, whichever room one works in."""

import configparser
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("identity", "ipam", "services", "datapath")
LONGEST_MODULE = 600
LONGEST_TARGET = 5


def _sources() -> list[Path]:
    return [path for name in (*OURS, "tests") for path in sorted((ROOT / name).rglob("*.py"))]


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _pinned() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {_normal(name): version for name, version in pairs}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", [*OURS, "tessera_wire"])
def test_no_other_installed_distribution_claims_a_name_of_ours(name):
    claimed = metadata.packages_distributions().get(name, [])
    assert set(claimed) <= {"tessera"}


def test_no_module_is_longer_than_the_house_allows():
    lengths = {path: len(path.read_text().splitlines()) for path in _sources()}
    assert {path: n for path, n in lengths.items() if n > LONGEST_MODULE} == {}


def test_no_target_of_the_makefile_is_longer_than_five_lines():
    bodies: dict[str, int] = {}
    target = ""
    for line in (ROOT / "Makefile").read_text().splitlines():
        if line.startswith("\t"):
            bodies[target] += 1
        elif found := re.match(r"([a-z-]+):", line):
            target = found[1]
            bodies[target] = 0
    assert {"setup", "run", "test", "lint", "type", "bench", "clean"} <= bodies.keys()
    assert {name: n for name, n in bodies.items() if n > LONGEST_TARGET} == {}


def test_the_version_is_the_same_wherever_it_is_written():
    version = _project()["project"]["version"]
    assert metadata.version("tessera") == version
    headings = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(one for one in headings if one != "Unreleased") == version


def test_every_dependency_is_pinned_and_nothing_else_says_where_from():
    project = _project()
    wanted = (
        project["project"]["dependencies"]
        + project["dependency-groups"]["dev"]
        + project["build-system"]["requires"]
    )
    names = {_normal(re.split(r"[<>=!~ \[]", one, maxsplit=1)[0]) for one in wanted}
    assert names - _pinned().keys() == set()
    assert "://" not in (ROOT / "requirements.lock").read_text()


def test_what_is_installed_is_what_is_pinned():
    installed = {_normal(one.metadata["Name"]): one.version for one in metadata.distributions()}
    wrong = {
        name: (installed.get(name), version)
        for name, version in _pinned().items()
        if name not in ("pip", "setuptools", "wheel") and installed.get(name) != version
    }
    assert wrong == {}


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("deploy/systemd/*.service")), ids=lambda p: p.name
)
def test_a_unit_starts_a_command_that_exists(path):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(path)
    words = unit["Service"]["ExecStart"].split()
    assert words[0] == "/usr/bin/tessera"
    from services.cli.layout import MODULES

    assert words[1] in {*MODULES, "up"}


def test_scripts_are_executable_and_their_syntax_is_valid():
    for path in (*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"):
        assert path.stat().st_mode & 0o111, path
        subprocess.run(["sh", "-n", str(path)], check=True)


def test_every_folder_with_a_design_is_in_the_index():
    index = (ROOT / "DESIGN.md").read_text()
    found = [
        path.relative_to(ROOT).as_posix()
        for name in (*OURS, "proto", "deploy", "tests")
        for path in sorted((ROOT / name).rglob("DESIGN.md"))
    ]
    assert [one for one in found if f"({one})" not in index] == []
