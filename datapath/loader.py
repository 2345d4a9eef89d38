"""Loads the programs, pins their maps and attaches them to the endpoints' interfaces.

The kernel keeps everything: maps and attachments are pinned, so that the agent's end changes
nothing for the packets, and the next agent takes over without a gap: `open` loads the programs
beside the running ones onto the same maps, `replace_programs` exchanges them in place.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self

from datapath import bpfcall, pins
from datapath.libbpf import BpfObject, Clsact
from datapath.maps.ring import EventRing
from datapath.maps.tables import MAPS_DIR, Sizes, Tables
from services.runtime.errors import NotFound, TesseraError, Unusable

AttachMode = Literal["auto", "tcx", "clsact"]


@dataclass(frozen=True, slots=True)
class _Direction:
    """One of the two programs; `suffix` ends the names of its pins."""

    suffix: str
    program: str
    tcx: int
    ingress: bool


_DIRECTIONS: Final = (
    _Direction("_in", "from_endpoint", bpfcall.TCX_INGRESS, ingress=True),
    _Direction("_out", "to_endpoint", bpfcall.TCX_EGRESS, ingress=False),
)


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
        self._links = bpf_dir / "links"
        self._filters = bpf_dir / "filters"
        self._mode = attach
        self._clsact = Clsact()

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
        """Unusable: not root, no BPF, object not built, pinned maps of another layout in use.

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
            return cls(bpf, bpf.load(log_dir), bpf_dir, attach)
        except TesseraError:
            bpf.close()
            raise

    @property
    def programs(self) -> dict[str, int]:
        """Descriptors by name, for test runs."""
        return dict(self._programs)

    def attach(self, ifindex: int, ifname: str) -> None:
        """Both directions; idempotent. Blocks about 35 ms with tcx: call it in a thread.

        The interface should be down: between the two directions it is half judged.
        """
        for direction in _DIRECTIONS:
            try:
                self._attach_one(ifindex, ifname, direction)
            except OSError as error:
                raise self._refusal(error, ifname) from error

    def _attach_one(self, ifindex: int, ifname: str, direction: _Direction) -> None:
        program = self._programs[direction.program]
        pin = self._links / (ifname + direction.suffix)
        if _link_at(pin) == ifindex:
            _exchange(pin, program)
            return
        pin.unlink(missing_ok=True)  # of an interface that is gone
        if self._mode != "clsact":
            try:
                link = bpfcall.tcx_attach(program, ifindex, direction.tcx)
            except OSError as error:
                if self._mode == "tcx" or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
            else:
                try:
                    bpfcall.pin(link, pin)
                finally:
                    os.close(link)
                return
        self._clsact.attach(ifindex, program, ingress=direction.ingress)
        self._note_filter(ifname, direction, program)

    def _note_filter(self, ifname: str, direction: _Direction, program: int) -> None:
        pin = self._filters / (ifname + direction.suffix)
        pin.unlink(missing_ok=True)
        bpfcall.pin(program, pin)

    def _refusal(self, error: OSError, ifname: str) -> TesseraError:
        if error.errno == errno.ENODEV:
            return NotFound(f"no interface {ifname} to attach to")
        remedy = "; set [agent] attach to auto or clsact" if self._mode == "tcx" else ""
        return Unusable(f"cannot attach to {ifname} by {self._mode}: {error.strerror}{remedy}")

    def detach(self, ifname: str) -> None:
        """No error when nothing is attached, or the interface is gone."""
        for direction in _DIRECTIONS:
            (self._links / (ifname + direction.suffix)).unlink(missing_ok=True)
            pin = self._filters / (ifname + direction.suffix)
            if pin.exists():
                index = _ifindex(ifname)
                if index:
                    self._clsact.detach(index, ingress=direction.ingress)
                pin.unlink()

    def attached(self) -> set[str]:
        """Interfaces that exist and have both programs attached."""
        seen: dict[str, int] = {}
        for ifname, _, _ in self._attachments():
            seen[ifname] = seen.get(ifname, 0) + 1
        return {ifname for ifname, count in seen.items() if count == len(_DIRECTIONS)}

    def _attachments(self) -> Iterator[tuple[str, _Direction, Path | None]]:
        """Live ones only; with the link's pin, or None for a filter."""
        for direction in _DIRECTIONS:
            for pin in sorted(self._links.glob("*" + direction.suffix)):
                ifname = pin.name.removesuffix(direction.suffix)
                index = _ifindex(ifname)
                if index and _link_at(pin) == index:
                    yield ifname, direction, pin
            for pin in sorted(self._filters.glob("*" + direction.suffix)):
                ifname = pin.name.removesuffix(direction.suffix)
                index = _ifindex(ifname)
                if index and self._clsact.program_id(index, ingress=direction.ingress):
                    yield ifname, direction, None

    def replace_programs(self) -> int:
        """Moves every attachment to the loaded programs, each in one step; how many changed.

        No packet meets an interface without a program. One that already runs the same
        instructions on the same maps is left alone.
        """
        changed = 0
        for ifname, direction, pin in list(self._attachments()):
            program = self._programs[direction.program]
            if pin is not None:
                changed += _exchange(pin, program)
                continue
            index = _ifindex(ifname)
            if _same_program(self._clsact.program_id(index, ingress=direction.ingress), program):
                continue
            self._clsact.attach(index, program, ingress=direction.ingress)
            self._note_filter(ifname, direction, program)
            changed += 1
        return changed

    def cleanup(self) -> None:
        """Detaches everything and removes every pin: the maps go with the last program."""
        for folder in (self._links, self._filters):
            for pin in list(folder.glob("*_*")):
                self.detach(pin.name.rpartition("_")[0])
        shutil.rmtree(self._bpf_dir)

    def close(self) -> None:
        """Releases descriptors; attachments and maps stay, pinned."""
        self.ring.close()
        self.tables.close()
        self._bpf.close()


def _ifindex(ifname: str) -> int:
    """0: no such interface here."""
    try:
        return socket.if_nametoindex(ifname)  # not sysfs, which shows its mounter's namespace
    except OSError:
        return 0


def _link_at(pin: Path) -> int:
    """Interface index of the tcx link pinned there; 0: no link, or its interface is gone."""
    try:
        link = bpfcall.get_pinned(pin)
    except FileNotFoundError:
        return 0
    try:
        return bpfcall.link_info(link).ifindex
    finally:
        os.close(link)


def _exchange(pin: Path, program: int) -> bool:
    """False: the link runs it already."""
    link = bpfcall.get_pinned(pin)
    try:
        if _same_program(bpfcall.link_info(link).program_id, program):
            return False
        bpfcall.link_update(link, program)
        return True
    finally:
        os.close(link)


def _same_program(running_id: int, program: int) -> bool:
    """Same instructions (the tag leaves map addresses out) on the same maps."""
    try:
        running = bpfcall.program_by_id(running_id)
    except FileNotFoundError:
        return False
    try:
        old, new = bpfcall.program_info(running), bpfcall.program_info(program)
    finally:
        os.close(running)
    return (old.tag, old.map_ids) == (new.tag, new.map_ids)
