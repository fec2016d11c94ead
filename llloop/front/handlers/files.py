"""Open files: OPEN, CREATE, TMPFILE, RELEASE, and all requests for data."""

from __future__ import annotations

import errno
import fcntl
import os

from llloop.front.access_times import AccessTimes
from llloop.front.context import Context
from llloop.front.handlers.base import Responder
from llloop.front.nowait import LONE_WRITE_LIMIT, READ_LIMIT, WRITE_LIMIT
from llloop.front.open_files import Handle
from llloop.front.request import NO_ID, FuseRequest, malformed
from llloop.linux import fuse
from llloop.linux.credentials import SETID_BITS
from llloop.linux.fuse import Opcode
from llloop.linux.syscalls import Attributes
from llloop.shared.messages import (
    APPEND,
    BUFFERED,
    CACHED,
    DATA_ONLY,
    INVALIDATE,
    KILL_PRIVILEGES,
    PIPED,
    SINGLE_CALL,
    Operation,
)
from llloop.shared.metrics import ERRORS, Gauge
from llloop.shared.negotiation import Feature
from llloop.shared.notifications import expire_attributes

# The counter of an open, by the flags of its reply.
_DECISIONS = {
    fuse.FOPEN_KEEP_CACHE: int(Gauge.KEPT),
    fuse.FOPEN_DIRECT_IO: int(Gauge.BYPASSED),
    0: int(Gauge.DROPPED),
}
_PASSED_THROUGH = int(Gauge.PASSED_THROUGH)


class FileRequests(Responder):
    """The handlers, see `Responder`. If a request goes to a worker, the worker answers it."""

    def __init__(self, context: Context, device: int) -> None:
        super().__init__(context, device)
        self._router = context.router
        self._leadership = context.leadership
        self._writeback = Feature.WRITEBACK_CACHE in context.features
        slots = context.router.slots
        self._view = slots.view
        self._sheet = slots.metrics.front
        self._gauges = slots.metrics.gauges
        self._failed_writes = [sheet.rows[Opcode.WRITE] for sheet in slots.metrics.workers]
        self._access_times = AccessTimes(context.inodes, slots.generation)
        self._scratch = memoryview(bytearray(fuse.OUT_HEADER_SIZE + READ_LIMIT))

    def open(self, request: FuseRequest) -> None:
        """FUSE_OPEN: reply with a handle, and whether the kernel may keep its cached pages."""
        flags, open_flags = fuse.OPEN_REQUEST.unpack_from(self._memory, request.base)
        clear_setid = bool(open_flags & fuse.FUSE_OPEN_KILL_SUIDGID)
        self.reply_open(request, *self._files.open(request.nodeid, flags, clear_setid, request.caller()))

    def reply_open(self, request: FuseRequest, number: int, attributes: Attributes) -> None:
        """Answer a FUSE_OPEN that has made the handle *number*."""
        nodeid = request.nodeid
        fields = self._open_reply_fields(request, number, nodeid, attributes, is_new=False)
        if self._handles.get(number).flags & os.O_ACCMODE and self._may_change_unasked(nodeid, attributes):
            expire_attributes(self._device, nodeid)
        if not self._send(fuse.OPEN_REPLY.pack(fuse.OPEN_REPLY.size, 0, request.unique, number, *fields)):
            self._files.release(number)

    def _may_change_unasked(self, nodeid: int, attributes: Attributes) -> bool:
        """Return whether attributes of a file just opened for writing may change without a request."""
        pages = self._written.get(nodeid)
        if pages is None or pages.passthrough:
            return pages is not None
        return not attributes.blocks and self._can_get_blocks(nodeid, attributes.size)

    def _open_reply_fields(
        self, request: FuseRequest, number: int, nodeid: int, attributes: Attributes, *, is_new: bool
    ) -> tuple[int, int]:
        """Return open_flags and backing_id for a file that was just opened."""
        handle = self._handles.get(number)
        backing = self._context.passthrough.back(handle, attributes, request.note, is_new=is_new)
        noflush = self._noflush(handle)
        if backing:
            self._gauges[_PASSED_THROUGH] += 1
            return fuse.FOPEN_PASSTHROUGH | noflush, backing
        if handle.unsized:
            flags = fuse.FOPEN_DIRECT_IO
        elif self._writeback and fcntl.fcntl(handle.descriptor, fcntl.F_GETFL) & os.O_APPEND:
            # An append-only file (chattr +a): writeback of whole pages would append them.
            flags = fuse.FOPEN_DIRECT_IO
        else:
            flags = self._context.policy.open_flags(self._inodes, nodeid, attributes)
            if flags == fuse.FOPEN_KEEP_CACHE and self._access_times.must_update(handle, attributes):
                flags = 0
        handle.uncached = flags == fuse.FOPEN_DIRECT_IO
        self._gauges[_DECISIONS[flags]] += 1
        return flags | noflush, 0

    def _noflush(self, handle: Handle) -> int:
        """Return FOPEN_NOFLUSH if close(2) cannot report an error.

        Without it, the kernel would report the error of another process's write to a reader, and to nobody else. With
        a writeback cache, the kernel ignores the flag.
        """
        if self._context.close_can_fail:
            return 0
        if handle.flags & os.O_ACCMODE == os.O_RDWR or (self._writeback and handle.is_writable):
            handle.writeback_errors = self._failed_writes[handle.shard][ERRORS]
            return fuse.FOPEN_NOFLUSH if handle.backing else 0
        return fuse.FOPEN_NOFLUSH

    def create(self, request: FuseRequest) -> None:
        """FUSE_CREATE: reply with an entry and a handle."""
        flags, mode, umask, _ = fuse.CREATE_REQUEST.unpack_from(self._memory, request.base)
        name = request.string(fuse.CREATE_REQUEST.size)
        self.reply_created(request, *self._files.create(request.nodeid, name, mode, flags, request.creator(umask)))

    def tmpfile(self, request: FuseRequest) -> None:
        """FUSE_TMPFILE: like CREATE, but llloop ignores the name."""
        flags, mode, umask, _ = fuse.CREATE_REQUEST.unpack_from(self._memory, request.base)
        self.reply_created(request, *self._files.tmpfile(request.nodeid, mode, flags, request.creator(umask)))

    def reply_created(self, request: FuseRequest, number: int, nodeid: int, attributes: Attributes) -> None:
        """Answer a FUSE_CREATE or FUSE_TMPFILE that has made the inode *nodeid* and the handle *number*."""
        fields = self._open_reply_fields(request, number, nodeid, attributes, is_new=True)
        payload = self._entry(nodeid, attributes) + fuse.OPEN_OUT.pack(number, *fields)
        if self._send(fuse.reply(request.unique, payload)):
            self._inodes.count(nodeid)
        else:
            self._files.release(number)
            self._tree.forget(nodeid, 0)

    def release(self, request: FuseRequest) -> None:
        """FUSE_RELEASE and FUSE_RELEASEDIR."""
        (number,) = fuse.RELEASE_REQUEST.unpack_from(self._memory, request.base)
        self._files.release(number)
        self._send(fuse.error_reply(request.unique, 0))

    def read(self, request: FuseRequest) -> None:
        """FUSE_READ."""
        number, offset, size, open_flags = fuse.READ_REQUEST.unpack_from(self._memory, request.base)
        if offset < 0:  # -1 would mean the file position (preadv2(2))
            raise malformed()
        handle = self._handles.get(number)
        pages = handle.pages
        may_overtake = True
        if pages is not None:
            pages.note_read(request.pid(), offset, size, request.taken)
            may_overtake = not self._router.is_unanswered(pages.write)  # else it could bring old data into the cache
        if (
            size <= READ_LIMIT
            and handle.read_flags is not None
            and may_overtake
            and self._read_in_place(handle, request.unique, offset, size)
        ):
            return
        flags = BUFFERED if handle.direct and not open_flags & os.O_DIRECT else 0
        if handle.unsized:
            flags |= SINGLE_CALL
        self._router.dispatch(request, handle, number, Operation.READ, offset, size, flags, in_order=not may_overtake)

    def _read_in_place(self, handle: Handle, unique: int, offset: int, size: int) -> bool:
        """Answer a READ if the data is in memory; return whether it was.

        A short read means the end of the file, or a page that is not in memory. The file's size shows which.
        """
        scratch = self._scratch
        header = fuse.OUT_HEADER_SIZE
        flags = handle.read_flags
        assert flags is not None
        try:
            count = os.preadv(handle.descriptor, [scratch[header : header + size]], offset, flags)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._files.nowait.refuse_reads(handle)
            return False
        if count < size and offset + count < os.fstat(handle.descriptor).st_size:
            return False
        length = header + count
        fuse.OUT_HEADER.pack_into(scratch, 0, length, 0, unique)
        self._send(scratch[:length])
        self._sheet.moved(Opcode.READ, count)
        return True

    def write(self, request: FuseRequest) -> None:
        """FUSE_WRITE: the payload stays in the slot."""
        uid, gid, number, offset, size, write_flags, open_flags = fuse.WRITE_REQUEST.unpack_from(
            self._memory, request.base
        )
        if fuse.WRITE_HEADER_SIZE + size != request.received or offset < 0:  # the bytes after it are another request's
            raise malformed()
        flags = KILL_PRIVILEGES if write_flags & fuse.FUSE_WRITE_KILL_SUIDGID else 0
        handle = self._handles.get(number)
        if uid == NO_ID:
            uid, gid = handle.opener
        cached = write_flags & fuse.FUSE_WRITE_CACHE
        if cached:  # such a request does not contain the writer's ids
            flags |= CACHED
            uid, gid = self._handles.writer(handle)
            if self._writeback:  # nor whether to clear set-ID bits, which the source may have set meanwhile
                flags |= _kill_flag(uid)
        elif open_flags & os.O_APPEND:
            flags |= APPEND
        if handle.direct and (cached or not open_flags & os.O_DIRECT):
            flags |= BUFFERED
        if handle.unsized:
            flags |= SINGLE_CALL
        pages = handle.pages
        if (
            pages is not None
            and pages.may_be_stale(request.pid(), offset, size, request.taken)
            and not cached  # the kernel does not drop pages under writeback
        ):
            flags |= INVALIDATE
        # Slot 0 is the lowest. So a request is in it exactly if no worker has a slot.
        limit = WRITE_LIMIT if request.slot else LONE_WRITE_LIMIT
        if (
            size <= limit
            and handle.write_flags is not None
            # Appends go to a worker, which notes its progress, because an append must not be done twice.
            and not flags & (APPEND | INVALIDATE)
            and handle.locking_group < 0  # the front writes with its own group
            and self._write_in_place(request, handle, offset, size, flags)
        ):
            return
        if request.piped:
            request.piped = False
            flags |= PIPED
        if flags & KILL_PRIVILEGES:
            gid = _group(handle, gid)
        extra = (handle.nodeid,) if flags & INVALIDATE else _watched(handle, flags)
        sent = self._router.dispatch(request, handle, number, Operation.WRITE, offset, size, flags, uid, gid, extra)
        if pages is not None:
            pages.write = sent
            if flags & INVALIDATE:
                pages.invalidation = sent

    def _write_in_place(self, request: FuseRequest, handle: Handle, offset: int, size: int, flags: int) -> bool:
        """Do a WRITE if it does not block; return whether it was done.

        If it fails or is short, a worker does it again and reports the error.
        """
        write_flags = handle.write_flags
        assert write_flags is not None
        if self._leadership.in_last_thread:  # even with RWF_NOWAIT, a write waits for a frozen file system
            return False
        self._context.setid.clear(bool(flags & KILL_PRIVILEGES))
        watched = _is_watched(handle, flags) and os.fstat(handle.descriptor).st_mode & SETID_BITS
        try:
            start = request.base + fuse.WRITE_HEADER_SIZE
            buffers = [self._view[start : start + size]]
            count = self._leadership.call(os.pwritev, handle.descriptor, buffers, offset, write_flags)
            if watched:
                expire_attributes(self._device, handle.nodeid)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._files.nowait.refuse_writes(handle)
            return False
        if count < size:
            return False
        write_reply = fuse.WRITE_REPLY
        self._send(write_reply.pack(write_reply.size, 0, request.unique, count))
        self._sheet.moved(Opcode.WRITE, count)
        return True

    def flush(self, request: FuseRequest) -> None:
        """FUSE_FLUSH: report errors of writes since the open, which a worker knows, or of the source's close(2)."""
        (number,) = fuse.FLUSH_REQUEST.unpack_from(self._memory, request.base)
        handle = self._handles.get(number)
        late = handle.writeback_errors
        has_failed = handle.is_writable and self._failed_writes[handle.shard][ERRORS] > late
        if has_failed or self._context.close_can_fail:
            self._router.dispatch(request, handle, number, Operation.FLUSH, extra=(late,))
        else:
            self._send(fuse.error_reply(request.unique, 0))

    def fsync(self, request: FuseRequest) -> None:
        """FUSE_FSYNC and FUSE_FSYNCDIR."""
        number, fsync_flags = fuse.FSYNC_REQUEST.unpack_from(self._memory, request.base)
        flags = DATA_ONLY if fsync_flags & fuse.FUSE_FSYNC_FDATASYNC else 0
        self._router.dispatch(request, self._handles.get(number), number, Operation.FSYNC, flags=flags)

    def fallocate(self, request: FuseRequest) -> None:
        """FUSE_FALLOCATE."""
        uid, gid, number, offset, size, mode = fuse.FALLOCATE_REQUEST.unpack_from(self._memory, request.base)
        handle = self._handles.get(number)
        if uid == NO_ID:
            uid, gid = handle.opener
        flags = self._kill_flag(request, handle)
        gid = _group(handle, gid)
        extra = (mode, *_watched(handle, flags))
        self._router.dispatch(request, handle, number, Operation.FALLOCATE, offset, size, flags, uid, gid, extra)

    def _kill_flag(self, request: FuseRequest, handle: Handle) -> int:
        """Return KILL_PRIVILEGES if the caller lacks CAP_FSETID, which FALLOCATE and COPY_FILE_RANGE do not contain.

        For root without capabilities, it only matters if the kernel has not asked for set-ID bits to be cleared.
        """
        who = request.caller()
        if who.uid or not handle.uncached:
            return _kill_flag(who.uid)
        return 0 if self._tree.permissions.is_trusted(who) else KILL_PRIVILEGES

    def lseek(self, request: FuseRequest) -> None:
        """FUSE_LSEEK: the kernel only sends SEEK_HOLE and SEEK_DATA."""
        number, offset, whence = fuse.LSEEK_REQUEST.unpack_from(self._memory, request.base)
        handle = self._handles.get(number)
        nodeid = handle.nodeid
        flags = 0
        if self._handles.may_be_dirty(nodeid):
            pages = self._written[nodeid]
            if self._writeback or not pages.is_clean or self._router.is_unanswered(pages.invalidation):
                flags = INVALIDATE
        extra = (whence, nodeid)
        sent = self._router.dispatch(request, handle, number, Operation.LSEEK, offset, flags=flags, extra=extra)
        if flags:
            pages.is_clean = True
            pages.invalidation = sent

    def copy_file_range(self, request: FuseRequest) -> None:
        """FUSE_COPY_FILE_RANGE: the worker of the target file does it."""
        uid, gid, source, source_offset, number, offset, size = fuse.COPY_FILE_RANGE_REQUEST.unpack_from(
            self._memory, request.base
        )
        source_handle = self._handles.get(source)
        source_handle.in_all_workers = True
        handle = self._handles.get(number)
        if uid == NO_ID:
            uid, gid = handle.opener
        flags = self._kill_flag(request, handle)
        gid = _group(handle, gid)
        copied = (source, source_handle.descriptor, source_offset, source_handle.nodeid, source_handle.file)
        extra = (*copied, *_watched(handle, flags))
        self._router.dispatch(request, handle, number, Operation.COPY_FILE_RANGE, offset, size, flags, uid, gid, extra)

    def syncfs(self, request: FuseRequest) -> None:
        """FUSE_SYNCFS: a worker does it with a descriptor of the root."""
        number = self._files.root_handle()
        self._router.dispatch(request, self._handles.get(number), number, Operation.SYNCFS)


def _kill_flag(uid: int) -> int:
    """Return KILL_PRIVILEGES unless *uid* is root, for requests that do not tell whether the caller has CAP_FSETID."""
    return KILL_PRIVILEGES if uid else 0


def _group(handle: Handle, gid: int) -> int:
    """Return the group with which to write for a caller without CAP_FSETID and with the primary group *gid*.

    A caller who writes to a file with a locking group is a member of it: for other users, the kernel has the
    set-group-ID bit cleared before the write.
    """
    return gid if handle.locking_group < 0 else handle.locking_group


def _is_watched(handle: Handle, flags: int) -> bool:
    """Return whether a change of data may clear set-ID bits without the kernel having asked for it."""
    return bool(flags & KILL_PRIVILEGES) and (handle.uncached or bool(flags & CACHED))


def _watched(handle: Handle, flags: int) -> tuple[int, ...]:
    """Return the inode whose attributes the worker must expire if set-ID bits are cleared, if any."""
    return (handle.nodeid,) if _is_watched(handle, flags) else ()
