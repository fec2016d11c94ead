"""Directories: opening, and listing them with or without their entries' attributes."""

from __future__ import annotations

from ... import wire
from ...syscalls import DirectoryEntry, statx
from ..handles import Handle
from .base import Responder

_NO_ENTRY = bytes(wire.ENTRY.size)
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
        entries = self._files.entries(number, offset)
        reply = bytearray(wire.OUT_HEADER_SIZE)
        limit = wire.OUT_HEADER_SIZE + size
        for position in range(offset, len(entries)):
            entry = _encode(entries[position], position)
            if len(reply) + len(entry) > limit:
                break
            reply += entry
        wire.OUT_HEADER.pack_into(reply, 0, len(reply), 0, unique)
        self._send(reply)

    def readdirplus(self, base: int, length: int) -> None:
        """FUSE_READDIRPLUS: as READDIR, with a lookup of each entry in the same reply."""
        unique, number, offset, size = wire.READDIR_REQUEST.unpack_from(self._memory, base)
        handle = self._handles.get(number)
        entries = self._files.entries(number, offset)
        reply = bytearray(wire.OUT_HEADER_SIZE)
        limit = wire.OUT_HEADER_SIZE + size
        looked_up = []
        for position in range(offset, len(entries)):
            entry = _encode(entries[position], position)
            if len(reply) + wire.ENTRY.size + len(entry) > limit:
                break
            nodeid, head = self._look_up(handle, entries[position].name)
            looked_up.append(nodeid)
            reply += head
            reply += entry
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


def _encode(entry: DirectoryEntry, position: int) -> bytes:
    """Return ``struct fuse_dirent`` with the name, whose cookie is the position of the entry that follows."""
    ino, kind, name = entry
    length = len(name)
    return wire.DIRENT.pack(ino, position + 1, length, kind) + name + bytes(-length % 8)
