"""Which interfaces the programs judge, and how they hang on them.

             attach                     settle
    nothing ───────► clsact filters ──────────────► tcx links
                     at once; anybody may           pinned; nobody else can take them off;
                     remove them                    the kernel holds a grace period per link

A tcx program runs before the filters of its hook and, with any answer these programs give, ends the
hook's run (net/core/dev.c, sch_handle_ingress, 6.6): with both there a packet is judged once. So
links are added before filters are removed, and whatever a crash leaves, `attached`, `detach`,
`replace_programs` and another `settle` deal with it. Calls for one interface exclude each other.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from datapath import bpfcall, links
from datapath.libbpf import Clsact
from services.runtime.errors import NotFound, TesseraError, Unusable

AttachMode = Literal["auto", "tcx", "clsact"]
Role = Literal["endpoint", "netdev", "overlay"]
"""What an interface is: an endpoint's host side, a device of the node's own, the VXLAN device."""

_NO_TCX: Final = (errno.EINVAL, errno.EOPNOTSUPP)
_LOCKS: Final = 64


@dataclass(frozen=True, slots=True)
class _Direction:
    """One of the two programs; `suffix` ends the names of its pins."""

    suffix: str
    program: str
    tcx: int
    ingress: bool


def _both(role: Role, mark: str) -> tuple[_Direction, _Direction]:
    return (
        _Direction(f"_{mark}in", f"from_{role}", bpfcall.TCX_INGRESS, ingress=True),
        _Direction(f"_{mark}out", f"to_{role}", bpfcall.TCX_EGRESS, ingress=False),
    )


DIRECTIONS: Final = {
    "endpoint": _both("endpoint", ""),
    "netdev": _both("netdev", "n"),
    "overlay": _both("overlay", "v"),
}
_EVERY: Final = tuple(direction for pair in DIRECTIONS.values() for direction in pair)


def programs_of(roles: Collection[Role]) -> set[str]:
    return {direction.program for role in roles for direction in DIRECTIONS[role]}


@dataclass(frozen=True, slots=True)
class _Attachment:
    """A live one. `link`: its pin; None for a filter."""

    ifindex: int
    ifname: str
    direction: _Direction
    link: Path | None


class Attachments:
    def __init__(self, programs: dict[str, int], bpf_dir: Path, mode: AttachMode) -> None:
        self._programs = programs
        self._links = bpf_dir / "links"
        self._filters = bpf_dir / "filters"
        self._mode = mode
        self._clsact = Clsact()
        # Several interfaces may share one; a lock per name would have to be forgotten some day.
        self._locks = tuple(threading.Lock() for _ in range(_LOCKS))

    def _alone(self, ifname: str) -> threading.Lock:
        return self._locks[hash(ifname) % _LOCKS]

    def attach(self, ifindex: int, ifname: str, role: Role) -> None:
        with self._alone(ifname):
            try:
                self._attach(ifindex, ifname, role)
            except OSError as error:
                raise self._refusal(error, ifname) from error

    def _attach(self, ifindex: int, ifname: str, role: Role) -> None:
        for direction in DIRECTIONS[role]:
            program = self._programs[direction.program]
            if self._linked(ifindex, ifname, direction):
                _exchange(self._links / (ifname + direction.suffix), program)
            elif self._mode == "tcx":
                self._link(ifindex, ifname, direction)
            else:
                self._quickly(ifindex, ifname, direction)
        if self._mode == "tcx":
            self._unfilter(ifindex, ifname)

    def _quickly(self, ifindex: int, ifname: str, direction: _Direction) -> None:
        try:
            self._filter(ifindex, ifname, direction)
        except OSError as error:
            if self._mode == "clsact" or error.errno == errno.ENODEV:
                raise
            # A kernel built without clsact, or an ingress qdisc of somebody else in its place.
            self._link(ifindex, ifname, direction)

    def settle(self, ifindex: int, ifname: str, role: Role) -> bool:
        directions = DIRECTIONS[role]
        with self._alone(ifname):
            if self._mode == "clsact" or links.ifindex_of(ifname) != ifindex:
                return False
            if not all(self._judged(ifindex, ifname, direction) for direction in directions):
                return False
            try:
                for direction in directions:
                    if not self._linked(ifindex, ifname, direction):
                        self._link(ifindex, ifname, direction)
            except OSError as error:
                if error.errno == errno.ENODEV or self._without_tcx(error):
                    return False
                raise self._refusal(error, ifname) from error
            self._unfilter(ifindex, ifname)
            return True

    def _without_tcx(self, error: OSError) -> bool:
        return self._mode == "auto" and error.errno in _NO_TCX

    def _refusal(self, error: OSError, ifname: str) -> TesseraError:
        if error.errno == errno.ENODEV:
            return NotFound(f"no interface {ifname} to attach to")
        remedy = "; set [agent] attach to auto or clsact" if self._mode == "tcx" else ""
        return Unusable(f"cannot attach to {ifname} by {self._mode}: {error.strerror}{remedy}")

    def _linked(self, ifindex: int, ifname: str, direction: _Direction) -> bool:
        return _link_at(self._links / (ifname + direction.suffix)) == ifindex

    def _judged(self, ifindex: int, ifname: str, direction: _Direction) -> bool:
        return self._linked(ifindex, ifname, direction) or self._filtered(
            ifindex, ifname, direction
        )

    def _filtered(self, ifindex: int, ifname: str, direction: _Direction) -> bool:
        """The pin tells ours from somebody else's filter in the same place."""
        pin = self._filters / (ifname + direction.suffix)
        return pin.exists() and self._clsact.program_id(ifindex, ingress=direction.ingress) != 0

    def _link(self, ifindex: int, ifname: str, direction: _Direction) -> None:
        pin = self._links / (ifname + direction.suffix)
        pin.unlink(missing_ok=True)  # of an interface that is gone
        link = bpfcall.tcx_attach(self._programs[direction.program], ifindex, direction.tcx)
        try:
            bpfcall.pin(link, pin)
        finally:
            os.close(link)

    def _filter(self, ifindex: int, ifname: str, direction: _Direction) -> None:
        program = self._programs[direction.program]
        self._clsact.attach(ifindex, program, ingress=direction.ingress)
        pin = self._filters / (ifname + direction.suffix)
        pin.unlink(missing_ok=True)
        bpfcall.pin(program, pin)

    def _unfilter(self, ifindex: int, ifname: str) -> None:
        """Only the filters. Taking the qdisc, too, would lose packets: the kernel silences the
        interface while it does (net/sched/sch_api.c, qdisc_graft)."""
        for direction in _EVERY:
            self._take_filter_off(ifindex, ifname, direction)

    def _take_filter_off(self, ifindex: int, ifname: str, direction: _Direction) -> None:
        if ifindex and self._filtered(ifindex, ifname, direction):
            self._clsact.detach(ifindex, ingress=direction.ingress)
        (self._filters / (ifname + direction.suffix)).unlink(missing_ok=True)

    def detach(self, ifname: str) -> None:
        with self._alone(ifname):
            for direction in _EVERY:
                self._take_off(ifname, direction)

    def _take_off(self, ifname: str, direction: _Direction) -> None:
        self._take_filter_off(links.ifindex_of(ifname), ifname, direction)
        _unlink(self._links / (ifname + direction.suffix))

    def names(self) -> set[str]:
        """Interfaces that anything is pinned for, gone ones included."""
        pins = [*self._links.glob("*_*"), *self._filters.glob("*_*")]
        return {pin.name.rpartition("_")[0] for pin in pins}

    def detach_all(self) -> None:
        for name in self.names():
            self.detach(name)

    def attached(self, role: Role) -> set[str]:
        both = {direction: set[str]() for direction in DIRECTIONS[role]}
        for found in self._live():
            if found.direction in both:
                both[found.direction].add(found.ifname)
        return set.intersection(*both.values())

    def unsettled(self, role: Role) -> dict[str, int]:
        if self._mode == "clsact":
            return {}
        return {
            found.ifname: found.ifindex
            for found in self._live()
            if found.link is None and found.direction in DIRECTIONS[role]
        }

    def _live(self) -> Iterator[_Attachment]:
        """A direction of an interface comes twice while it has a link and a filter."""
        for direction in _EVERY:
            for pin in sorted(self._links.glob("*" + direction.suffix)):
                ifname = pin.name.removesuffix(direction.suffix)
                index = links.ifindex_of(ifname)
                if index and _link_at(pin) == index:
                    yield _Attachment(index, ifname, direction, pin)
            for pin in sorted(self._filters.glob("*" + direction.suffix)):
                ifname = pin.name.removesuffix(direction.suffix)
                index = links.ifindex_of(ifname)
                if index and self._filtered(index, ifname, direction):
                    yield _Attachment(index, ifname, direction, None)

    def replace_programs(self) -> int:
        changed = 0
        for found in list(self._live()):
            with self._alone(found.ifname):
                changed += self._renew(found)
        return changed

    def _renew(self, found: _Attachment) -> bool:
        program = self._programs.get(found.direction.program)
        if program is None:  # of a role this node has no more
            self._take_off(found.ifname, found.direction)
            return True
        if found.link is not None:
            return _exchange(found.link, program)
        running = self._clsact.program_id(found.ifindex, ingress=found.direction.ingress)
        if _same_program(running, program):
            return False
        self._filter(found.ifindex, found.ifname, found.direction)
        return True


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


def _unlink(pin: Path) -> None:
    """At once: a link whose last pin goes is taken off by the kernel some time later."""
    try:
        link = bpfcall.get_pinned(pin)
    except FileNotFoundError:
        return
    try:
        if bpfcall.link_info(link).ifindex:
            bpfcall.link_detach(link)
    except OSError as error:
        if error.errno != errno.ENOLINK:  # the interface went meanwhile
            raise
    finally:
        os.close(link)
    pin.unlink()


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
