"""Loads the programs, pins their maps and attaches them to endpoints' interfaces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from datapath.maps.ring import EventRing
from datapath.maps.tables import Sizes, Tables

AttachMode = Literal["auto", "tcx", "clsact"]


@dataclass(slots=True)
class Datapath:
    """The loaded programs of this node and what they are attached to."""

    tables: Tables
    ring: EventRing

    @classmethod
    def open(
        cls,
        object_path: Path,
        bpf_dir: Path,
        sizes: Sizes | None = None,
        *,
        attach: AttachMode = "auto",
        log_dir: Path | None = None,
    ) -> Self:
        """Unusable: not root, no BPF, object not built, pinned maps of another layout in use."""
        raise NotImplementedError

    def attach(self, ifindex: int, ifname: str) -> None:
        """Both directions; idempotent. Blocks about 35 ms with tcx: call it in a thread."""
        raise NotImplementedError

    def detach(self, ifname: str) -> None:
        """No error when nothing is attached."""
        raise NotImplementedError

    def attached(self) -> set[str]:
        """Host-side interface names whose programs are attached and whose interface exists."""
        raise NotImplementedError

    def replace_programs(self) -> int:
        """Moves every existing attachment to the loaded programs; how many were changed."""
        raise NotImplementedError

    def cleanup(self) -> None:
        """Removes every pin: detaches all and forgets all maps."""
        raise NotImplementedError

    def close(self) -> None:
        """Releases descriptors; attachments and maps stay, pinned."""
        raise NotImplementedError
