"""The node's address log on disk: <state_dir>/addresses.log.

    8 bytes: length, crc32 │ one event (msgpack) │ 8 bytes ...

An event counts once it is synced; several that are asked for at once share one sync. The file is
replaced by a short one (write aside, fsync, rename) when it has grown, and at start. A torn end is
what a crash leaves of an event that nobody was told of: it is cut off.
"""

from __future__ import annotations

import asyncio
import os
import struct
import uuid
import zlib
from pathlib import Path

import msgspec

from datapath.agent import checkpoint
from ipam.window import Event, Local
from services.runtime.errors import Exhausted
from services.runtime.log import logger

log = logger(__name__)

FILE = "addresses.log"
INSTANCE_FILE = "addresses.instance"
# Some thousands of events; read back in some ten milliseconds.
GROWN_BYTES = 1 << 20

_FRAME = struct.Struct("<II")
_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
_encode = msgspec.msgpack.encode


class AddressLog:
    """`instance`: changes when the disk was lost."""

    def __init__(self, folder: Path) -> None:
        """Reads what there is, and begins a new file with it. Blocks. Raises `Exhausted`."""
        self._path = folder / FILE
        self.instance = _instance(folder / INSTANCE_FILE)
        self.local = _read(self._path)
        self._descriptor = -1
        self._size = 0
        self._queue: list[bytes] = []
        self._asked = 0
        self._synced = 0
        self._whole = False
        self._writing = asyncio.Lock()
        self._rewrite()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    async def append(self, *events: Event) -> None:
        """In force at once, on disk when this returns. Exhausted: it is not; the next append tries
        to write everything anew, and until that succeeds nothing more is handed out."""
        for event in events:
            self.local.apply(event)
            self._queue.append(_framed(event))
        self._asked += 1
        mine = self._asked
        async with self._writing:
            if self._synced >= mine:
                return
            covers, frames = self._asked, b"".join(self._queue)
            self._queue.clear()
            if self._whole and self._size + len(frames) < GROWN_BYTES:
                await asyncio.to_thread(self._write, frames)
            else:
                saved = _framed(self.local.saved())
                await asyncio.to_thread(self._replace, saved)
            self._synced = covers

    def _write(self, frames: bytes) -> None:
        try:
            done = os.write(self._descriptor, frames)
            os.fdatasync(self._descriptor)
        except OSError as error:
            self._whole = False
            raise _unwritable(self._path, error) from error
        self._size += done
        if done != len(frames):
            self._whole = False
            raise Exhausted(f"cannot write {self._path}: no room; make room there")

    def _rewrite(self) -> None:
        self._replace(_framed(self.local.saved()))

    def _replace(self, frame: bytes) -> None:
        self._whole = False
        try:
            checkpoint.replace(self._path, frame)
            self.close()
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        self._size, self._whole = len(frame), True


def _instance(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        fresh = uuid.uuid4().hex
        try:
            checkpoint.replace(path, fresh.encode())
        except OSError as error:
            raise _unwritable(path, error) from error
        return fresh


def _framed(event: Event) -> bytes:
    payload = _encode(event)
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _read(path: Path) -> Local:
    local, at = Local(), 0
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return local
    while at + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, at)
        payload = data[at + _FRAME.size : at + _FRAME.size + length]
        if len(payload) < length or zlib.crc32(payload) != checksum:
            break
        try:
            local.apply(_decoder.decode(payload))
        except (msgspec.DecodeError, ValueError):
            break
        at += _FRAME.size + length
    if at < len(data):
        log.warning("addresses.log_cut", file=str(path), offset=at, count=len(data) - at)
    return local


def _unwritable(path: Path, error: OSError) -> Exhausted:
    return Exhausted(f"cannot write {path}: {error.strerror}; make room there or mend the disk")
