"""OPENDIR, READDIR, READDIRPLUS and RELEASEDIR."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from llloop.front.context import Context
from llloop.front.descriptor_shares import DIRECTORY_WEIGHT
from llloop.front.handlers.base import Responder
from llloop.front.handlers.entries import entries
from llloop.front.handlers.listing import Listing, Part, name_of, number_of
from llloop.front.handlers.recent_lookups import RecentLookups
from llloop.front.inodes import ROOT
from llloop.front.open_files import Handle
from llloop.front.recovery.snapshots import append, load, make
from llloop.front.request import FuseRequest
from llloop.linux import fuse
from llloop.linux.syscalls import Attributes, DirectoryBlocks, StatxTable

_NO_ENTRY = bytes(fuse.ENTRY.size)
_NOT_LOOKED_UP = frozenset({b".", b".."})
# The kernel requests the first entries with attributes, and further ones depending on whether the program uses these.
# In a directory with more than _LARGE entries, the first reply only has _SAMPLE entries to find that out.
_LARGE = 1000
_SAMPLE = 32
# The number of entries that are looked up at a time.
_ROWS = 128


class DirectoryRequests(Responder):
    """The handlers, see `Responder`. *recent* counts recent lookups."""

    def __init__(self, context: Context, device: int, recent: RecentLookups) -> None:
        super().__init__(context, device)
        self._recent = recent
        self._table = StatxTable(_ROWS)
        self._listings: dict[int, Listing] = {}
        self._device_of_root = context.inodes.get(ROOT).device
        self._entries = entries if context.shown is None else self._shown_entries

    def opendir(self, request: FuseRequest) -> None:
        """FUSE_OPENDIR: reply with a handle, and whether the kernel may use its cached listing."""
        self.reply_open(request, *self._files.opendir(request.nodeid, request.caller()))

    def reply_open(self, request: FuseRequest, number: int, attributes: Attributes) -> None:
        """Answer a FUSE_OPENDIR that has made the handle *number*."""
        flags = self._context.policy.directory_flags(self._inodes, request.nodeid, attributes)
        if not self._send(fuse.OPEN_REPLY.pack(fuse.OPEN_REPLY.size, 0, request.unique, number, flags, 0)):
            self._files.release(number)

    def releasedir(self, request: FuseRequest) -> None:
        """FUSE_RELEASEDIR."""
        (number,) = fuse.RELEASE_REQUEST.unpack_from(self._memory, request.base)
        self._listings.pop(number, None)
        self._files.release(number)
        self._send(fuse.error_reply(request.unique, 0))

    def _listing(self, handle: Handle, number: int, offset: int) -> Listing:
        """Return the listing of an open directory; a new one if its start is requested (rewinddir(3))."""
        listing = self._listings.get(number)
        if listing is None or offset == 0:
            first, position = None, 0
            if handle.snapshot >= 0:
                if offset:
                    data, position = load(handle.snapshot)
                    first = Part.restored(data)
                else:
                    self._handles.note_snapshot(handle, -1)
            device = self._inodes.get(handle.nodeid).device
            inodes = self._inodes
            listing = self._listings[number] = Listing(
                DirectoryBlocks(handle.descriptor, position, self._context.leadership.call_even_in_last_thread),
                lambda ino: inodes.shown(device, ino),
                foreign=device != self._device_of_root,
                first=first,
            )
            listing.saved = len(listing.parts)
        return listing

    def _keep_for_next_front(self, handle: Handle, listing: Listing, cookie: int) -> None:
        """Save a listing that the program has not read completely.

        If the next front read the directory again, and it had changed meanwhile (rm -r), other entries would be at the
        same positions.

        Args:
            handle: the directory.
            listing: its entries.
            cookie: the number of entries that the program has after this reply.
        """
        parts = listing.parts
        if cookie and listing.saved < len(parts) and not (listing.complete and cookie == len(listing)):
            if handle.snapshot < 0 and not self._handles.shares.has_room(handle.opener[0], DIRECTORY_WEIGHT):
                return
            snapshot = handle.snapshot if handle.snapshot >= 0 else make()
            append(snapshot, b"".join(part.data for part in parts[listing.saved :]), listing.position)
            listing.saved = len(parts)
            if handle.snapshot < 0:
                self._handles.note_snapshot(handle, snapshot)

    def readdir(self, request: FuseRequest) -> None:
        """FUSE_READDIR: as many entries as fit after the cookie, which is the number of entries already returned."""
        number, offset, size = fuse.READDIR_REQUEST.unpack_from(self._memory, request.base)
        handle = self._handles.get(number)
        listing = self._listing(handle, number, offset)
        entries, cookie = listing.fitting(offset, size)
        self._keep_for_next_front(handle, listing, cookie)
        self._send(fuse.reply(request.unique, entries))

    def readdirplus(self, request: FuseRequest) -> None:
        """FUSE_READDIRPLUS: like READDIR, with a lookup of each entry in the same reply."""
        number, offset, size = fuse.READDIR_REQUEST.unpack_from(self._memory, request.base)
        handle = self._handles.get(number)
        listing = self._listing(handle, number, offset)
        records = listing.records(offset, size, fuse.ENTRY.size)
        if offset == 0 and len(listing) > _LARGE:
            del records[_SAMPLE:]
        self._keep_for_next_front(handle, listing, offset + len(records))
        looked_up, found = self._look_up(handle, records, len(listing), request.taken) if records else ([], [])
        if self._send(fuse.reply(request.unique, b"".join(chain.from_iterable(zip(found, records, strict=True))))):
            for nodeid in looked_up:
                self._inodes.count(nodeid)
        else:
            for nodeid in looked_up:
                self._tree.forget(nodeid, 0)

    def _shown_entries(
        self, table: StatxTable, nodeids: Sequence[int], shown: Iterable[int], validity: tuple[int, int, int, int]
    ) -> list[bytes]:
        """Return what `entries` returns, with the attributes that the mount shows."""
        assert self._context.shown is not None
        self._context.shown.convert(table.memory, len(nodeids))
        return entries(table, nodeids, shown, validity)

    def _look_up(self, handle: Handle, records: list[bytes], among: int, now: int) -> tuple[list[int], list[bytes]]:
        """Look up the entries of a part of a listing.

        Args:
            handle: the directory.
            records: the ``struct fuse_dirent`` of each entry.
            among: the number of entries of the directory that were read.
            now: when the front took the request (monotonic clock, nanoseconds).

        Returns:
            The nodeids that were looked up, and ``struct fuse_entry_out`` for each record. It contains only zeros if
            the kernel has to look up the entry itself.
        """
        parent, inodes, table, written = handle.nodeid, self._inodes, self._table, self._written
        heard = self._heard
        names = [name_of(record) for record in records]
        wanted = [position for position, name in enumerate(names) if name not in _NOT_LOOKED_UP]
        if 2 * self._recent.count(parent, now) > among:
            # The kernel has just looked up most entries one by one, and only needs the names of those that it knows.
            device = inodes.get(parent).device
            wanted = [position for position in wanted if not inodes.knows(number_of(records[position]), device)]
        looked_up = []
        result = [_NO_ENTRY] * len(records)
        for first in range(0, len(wanted), len(table)):
            positions = wanted[first : first + len(table)]
            is_there = table.statx_names(handle.descriptor, [names[position] for position in positions])
            nodeids, numbers = [], []
            validity = self._validity
            for row, position in enumerate(positions):
                nodeid = number = 0
                if is_there[row]:  # otherwise removed or inaccessible; a later lookup reports that
                    attributes = table.attributes(row)
                    nodeid = inodes.remember(parent, names[position], attributes)
                    if nodeid in written:  # open for writing: its attributes may change at any time
                        nodeids.append(0)
                        numbers.append(0)
                        continue
                    if heard is not None:
                        its = heard.of_entry(nodeid, attributes)
                        if its is heard.only_entry:  # all entries get the same timeouts
                            self._tree.forget(nodeid, 0)
                            nodeids.append(0)
                            numbers.append(0)
                            continue
                        validity = min(validity, its)
                    number = inodes.shown(attributes.device, attributes.ino)
                    looked_up.append(nodeid)
                nodeids.append(nodeid)
                numbers.append(number)
            found = self._entries(table, nodeids, numbers, validity.both)
            for position, nodeid, entry in zip(positions, nodeids, found, strict=True):
                if nodeid:
                    result[position] = entry
        return looked_up, result
