"""Directories: opening, and listing them with or without their entries' attributes."""

from __future__ import annotations

from itertools import islice

from ... import wire
from ...syscalls import statx
from ..handles import Handle
from .base import Responder

_NO_ENTRY = bytes(wire.ENTRY.size)
# What pads a name to a multiple of eight bytes, by its length modulo eight (FUSE_DIRENT_ALIGN).
_PADDING = tuple(bytes(-length % 8) for length in range(8))
_NOT_LOOKED_UP = frozenset({b".", b".."})


class DirectoryRequests(Responder):
    """The handlers; see `Responder`."""

    def opendir(self, base: int, length: int) -> None:
        """FUSE_OPENDIR."""
        unique, nodeid = wire.NODE_REQUEST.unpack_from(self._memory, base)
        number = self._files.opendir(nodeid)
        if not self._send(wire.OPEN_REPLY.pack(wire.OPEN_REPLY.size, 0, unique, number, 0, 0)):
            self._files.release(number)

    def readdir(self, base: int, length: int) -> None:
        """FUSE_READDIR: as many entries as fit, from the cookie on, which is the number of entries already had."""
        unique, number, offset, size = wire.READDIR_REQUEST.unpack_from(self._memory, base)
        # The shortest entry takes this much, so no more of them than this can fit.
        entries = self._files.entries(number, offset)[offset : offset + size // (wire.DIRENT.size + 8)]
        records = []
        room = size
        pack = wire.DIRENT.pack
        for cookie, (ino, kind, name) in enumerate(entries, offset + 1):
            length = len(name)
            record = pack(ino, cookie, length, kind) + name + _PADDING[length % 8]
            room -= len(record)
            if room < 0:
                break
            records.append(record)
        self._send(wire.reply(unique, b"".join(records)))

    def readdirplus(self, base: int, length: int) -> None:
        """FUSE_READDIRPLUS: as READDIR, with a lookup of each entry in the same reply."""
        unique, number, offset, size = wire.READDIR_REQUEST.unpack_from(self._memory, base)
        handle = self._handles.get(number)
        entries = self._files.entries(number, offset)
        reply = bytearray(wire.OUT_HEADER_SIZE)
        limit = wire.OUT_HEADER_SIZE + size
        looked_up = []
        pack = wire.DIRENT.pack
        for cookie, (ino, kind, name) in enumerate(islice(entries, offset, None), offset + 1):
            length = len(name)
            record = pack(ino, cookie, length, kind) + name + _PADDING[length % 8]
            if len(reply) + wire.ENTRY.size + len(record) > limit:
                break
            nodeid, head = self._look_up(handle, name)
            looked_up.append(nodeid)
            reply += head
            reply += record
        wire.OUT_HEADER.pack_into(reply, 0, len(reply), 0, unique)
        if not self._send(reply):
            for nodeid in looked_up:
                self._tree.forget(nodeid, 1)

    def _look_up(self, handle: Handle, name: bytes) -> tuple[int, bytes]:
        """Return an entry's number and ``struct fuse_entry_out``; nothing but zeros if the kernel is to ask itself."""
        if name in _NOT_LOOKED_UP:
            return 0, _NO_ENTRY
        try:
            attributes = statx(handle.descriptor, name)
        except OSError:  # gone meanwhile, or not to be reached: a lookup will say so
            return 0, _NO_ENTRY
        nodeid = self._tree.inodes.remember(handle.nodeid, name, attributes)
        return nodeid, self._entry(nodeid, attributes)
