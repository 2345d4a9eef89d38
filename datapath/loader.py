"""Loads the programs, pins their maps and hands both to what attaches them.

The kernel keeps everything: maps and attachments are pinned, so that the agent's end changes
nothing for the packets, and the next agent takes over without a gap: `open` loads the programs
beside the running ones onto the same maps, or onto new ones filled from those of an earlier
layout (migrate.py), `replace_programs` exchanges them in place.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Final, Self

from datapath import migrate, pins
from datapath.attachments import Attachments, AttachMode, Role, programs_of
from datapath.libbpf import BpfObject
from datapath.maps.ring import EventRing
from datapath.maps.tables import MAPS_DIR, Sizes, Tables
from services.runtime.errors import TesseraError

__all__ = ["AttachMode", "Datapath", "Role"]

_ENDPOINTS: Final[tuple[Role, ...]] = ("endpoint",)


class Datapath:
    """The loaded programs of this node, their maps, and what they are attached to."""

    def __init__(
        self,
        bpf: BpfObject,
        programs: dict[str, int],
        bpf_dir: Path,
        attach: AttachMode,
    ) -> None:
        """Use `open`."""
        self.tables = Tables.pinned(bpf_dir)
        self.ring = EventRing.pinned(bpf_dir)
        self._bpf = bpf
        self._programs = programs
        self._bpf_dir = bpf_dir
        self._attachments = Attachments(programs, bpf_dir, attach)

    @classmethod
    def open(
        cls,
        object_path: Path,
        bpf_dir: Path,
        sizes: Sizes | None = None,
        *,
        attach: AttachMode = "auto",
        log_dir: Path | None = None,
        roles: Collection[Role] = _ENDPOINTS,
    ) -> Self:
        """Unusable: not root, no BPF, object not built, pinned maps of another size in use.

        `roles`: what interfaces will be attached as; each costs its programs' verification.

        Attaches nothing and changes nothing for programs already attached.
        """
        pins.prepare(bpf_dir)
        sizes = sizes or Sizes()
        bpf = BpfObject(object_path)
        try:
            for name, spec in bpf.maps.items():
                if sizes.of(name):
                    spec.resize(sizes.of(name))
                pins.pin_map(spec, bpf_dir / MAPS_DIR / name)
            made = cls(bpf, bpf.load(log_dir, programs_of(roles)), bpf_dir, attach)
            migrate.carry_over(bpf_dir, made.tables)
        except TesseraError:
            bpf.close()
            raise
        return made

    @property
    def programs(self) -> dict[str, int]:
        """Descriptors by name, for test runs."""
        return dict(self._programs)

    def attach(self, ifindex: int, ifname: str, role: Role = "endpoint") -> None:
        """Both directions judge from here on; idempotent. About a millisecond, 20 to 40 with
        attach = tcx.

        The interface should be down: between the two directions it is half judged.
        """
        self._attachments.attach(ifindex, ifname, role)

    def settle(self, ifindex: int, ifname: str, role: Role = "endpoint") -> bool:
        """Moves what `attach` put up in haste to its lasting place; whether it is there now.

        Packets are judged once, by the same programs, before, during and after. Holds the kernel's
        rtnl lock for 20 to 40 ms, so call it when nobody waits for an interface, in a thread.
        Idempotent; False where there is nothing to move: attach = clsact, a kernel before 6.6,
        an interface that is gone or detached.
        """
        return self._attachments.settle(ifindex, ifname, role)

    def detach(self, ifname: str) -> None:
        """No error when nothing is attached, or the interface is gone."""
        self._attachments.detach(ifname)

    def attached(self, role: Role = "endpoint") -> set[str]:
        """Interfaces that exist and are judged in both directions, settled or not."""
        return self._attachments.attached(role)

    def unsettled(self, role: Role = "endpoint") -> dict[str, int]:
        """Interfaces, with their ifindex, that `settle` has something to do for."""
        return self._attachments.unsettled(role)

    def replace_programs(self) -> int:
        """Moves every attachment to the loaded programs, each in one step; how many changed.

        No packet meets an interface without a program. One that already runs the same
        instructions on the same maps is left alone; one in a role that was not opened is detached.
        """
        changed = self._attachments.replace_programs()
        migrate.forget(self._bpf_dir)
        return changed

    def cleanup(self) -> None:
        """Detaches everything and removes every pin: the maps go with the last program."""
        self._attachments.detach_all()
        shutil.rmtree(self._bpf_dir)

    def close(self) -> None:
        """Releases descriptors; attachments and maps stay, pinned."""
        self.ring.close()
        self.tables.close()
        self._bpf.close()
