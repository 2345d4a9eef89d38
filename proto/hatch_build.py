"""Build hook: protoc over tessera_wire/**.proto, stubs beside their sources.

Runs for wheels and editable installs alike; `python proto/hatch_build.py` runs it alone.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script outside a build
    BuildHookInterface = object  # type: ignore[assignment,misc]

ROOT = Path(__file__).resolve().parent


def generate(root: Path = ROOT) -> None:
    from grpc_tools import protoc

    sources = sorted(root.rglob("*.proto"))
    stamp = root / "tessera_wire" / ".generated"
    newest = max(s.stat().st_mtime_ns for s in [*sources, Path(__file__)])
    if stamp.exists() and stamp.stat().st_mtime_ns >= newest:
        return
    well_known = str(resources.files("grpc_tools") / "_proto")
    bin_dir = Path(sys.executable).parent
    command = [
        "protoc",
        f"-I{root}",
        f"-I{well_known}",
        f"--python_out={root}",
        f"--grpc_python_out={root}",
        f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
        f"--mypy_out=quiet:{root}",
        f"--mypy_grpc_out=quiet:{root}",
        *(str(s) for s in sources),
    ]
    if protoc.main(command) != 0:
        raise SystemExit("protoc failed; its message is above")
    stamp.touch()


class CustomBuildHook(BuildHookInterface):  # type: ignore[misc,valid-type]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate(Path(self.root) / "proto")


if __name__ == "__main__":
    generate()
