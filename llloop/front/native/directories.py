"""Directories: opening, and listing them with or without their entries' attributes."""

from __future__ import annotations

from ... import wire
from ...syscalls import directory_blocks, fstatx, statx
from ..handles import Handle
from ..inodes import ROOT
from ..mirror import Mirror
from ..snapshots import load, save
from .base import Responder
from .listing import Listing

_NO_ENTRY = bytes(wire.ENTRY.size)
_NOT_LOOKED_UP = frozenset({b".", b".."})
# The kernel asks for the first entries with attributes, and for the others as the reader then turns out to want them.
# In a directory with more entries than the first number, the second many are enough to find out.
_LARGE = 1000
_SAMPLE = 32


class DirectoryRequests(Responder):
    """The handlers; see `Responder`."""

    def __init__(self, mirror: Mirror, device: int) -> None:
        super().__init__(mirror, device)
        self._listings: dict[int, Listing] = {}
        self._device_of_root = mirror.inodes.get(ROOT).device

    def opendir(self, base: int, length: int) -> None:
        """FUSE_OPENDIR: reply with a handle and whether the kernel may show the listing it has."""
        unique, nodeid = wire.NODE_REQUEST.unpack_from(self._memory, base)
        number = self._begin_open(unique)
        if number is None:
            number, attributes = self._files.opendir(nodeid)
        else:
            attributes = fstatx(self._handles.get(number).descriptor)
        flags = self._mirror.policy.directory_flags(self._inodes.get(nodeid), attributes)
        if not self._send(wire.OPEN_REPLY.pack(wire.OPEN_REPLY.size, 0, unique, number, flags, 0)):
            self._files.release(number)

    def releasedir(self, base: int, length: int) -> None:
        """FUSE_RELEASEDIR."""
        unique, number = wire.RELEASE_REQUEST.unpack_from(self._memory, base)
        self._listings.pop(number, None)
        self._files.release(number)
        self._send(wire.error_reply(unique, 0))

    def _listing(self, handle: Handle, number: int, offset: int) -> Listing:
        """Return a directory's entries as they were when it was first read, or read from its start (rewinddir(3))."""
        listing = self._listings.get(number)
        if listing is None and offset and handle.snapshot >= 0:
            listing = self._listings[number] = Listing.restored(load(handle.snapshot))
        if listing is None or offset == 0:
            if handle.snapshot >= 0:
                self._handles.note_snapshot(handle, -1)
            device = self._inodes.get(handle.nodeid).device
            inodes = self._inodes
            listing = self._listings[number] = Listing(
                directory_blocks(handle.descriptor),
                lambda ino: inodes.nodeid(device, ino),
                foreign=device != self._device_of_root,
            )
        return listing

    def _keep_for_next_front(self, handle: Handle, listing: Listing, cookie: int) -> None:
        """Save a listing of which the reader has not had all, and so comes back for more.

        Read afresh, a directory that has changed meanwhile (rm -r) would have others in their places.

        Args:
            handle: the directory.
            listing: its entries.
            cookie: how many of them the reader has when it gets the answer at hand.
        """
        if 0 < cookie < len(listing) and handle.snapshot < 0:
            self._handles.note_snapshot(handle, save(listing.data))

    def readdir(self, base: int, length: int) -> None:
        """FUSE_READDIR: as many entries as fit, from the cookie on, which is the number of entries already had."""
        unique, number, offset, size = wire.READDIR_REQUEST.unpack_from(self._memory, base)
        handle = self._handles.get(number)
        listing = self._listing(handle, number, offset)
        entries, cookie = listing.fitting(offset, size)
        self._keep_for_next_front(handle, listing, cookie)
        self._send(wire.reply(unique, entries))

    def readdirplus(self, base: int, length: int) -> None:
        """FUSE_READDIRPLUS: as READDIR, with a lookup of each entry in the same reply."""
        unique, number, offset, size = wire.READDIR_REQUEST.unpack_from(self._memory, base)
        handle = self._handles.get(number)
        listing = self._listing(handle, number, offset)
        reply = bytearray(wire.OUT_HEADER_SIZE)
        limit = wire.OUT_HEADER_SIZE + size
        looked_up = []
        given = 0
        end = len(listing)
        if offset == 0 and end > _LARGE:
            end = _SAMPLE
        for position in range(offset, end):
            record, name = listing.record(position)
            if len(reply) + wire.ENTRY.size + len(record) > limit:
                break
            nodeid, head = self._look_up(handle, name)
            if nodeid:
                looked_up.append(nodeid)
            reply += head
            reply += record
            given += 1
        self._keep_for_next_front(handle, listing, offset + given)
        wire.OUT_HEADER.pack_into(reply, 0, len(reply), 0, unique)
        if self._send(reply):
            for nodeid in looked_up:
                self._inodes.count(nodeid)
        else:
            for nodeid in looked_up:
                self._tree.forget(nodeid, 0)

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
