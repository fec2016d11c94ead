"""The requests that llloop answers itself, decoded from and encoded to the kernel's own structs.

A handler gets the position of the request in the arena and its length. It writes its reply to
/dev/fuse, or hands the request to a worker, which will. `NativeRequests.table` is the whole
choice of what does not go through libfuse, and why:

* READ, WRITE and what else moves or waits for data: so that the loop never waits.
* OPEN, CREATE: llfuse forces KEEP_CACHE, with which old bytes would be read for ever.
* SETATTR, SETXATTR: llfuse drops the flags that say whether set-ID bits go, and UTIME_NOW.
* READDIR, RELEASE: they come often and cost half as much here.
* FALLOCATE, LSEEK, COPY_FILE_RANGE, RENAME2, TMPFILE, SYNCFS, STATX: libfuse 2.9 does not know them.
* INTERRUPT: libfuse would wait for a request it never sees. ENOSYS tells the kernel not to send any.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from llloop.workers.leases import OwnDescriptors
from llloop.workers.replies import KernelReplies
from llloop.workers.transfers import Transfers

from .. import wire
from ..arena import Counters
from ..negotiation import Feature
from ..privilege import OwnIdentity
from ..protocol import APPEND, BUFFERED, DATA_ONLY, KILL_PRIVILEGES, Operation, Request
from ..syscalls import Attributes
from ..wire import Opcode
from .mirror import Mirror
from .tree import Changes, Requester

Handler = Callable[[int, int], None]


class NativeRequests:
    """The handlers.

    Args:
        mirror: what they work on.
        device: the descriptor of /dev/fuse.
    """

    def __init__(self, mirror: Mirror, device: int) -> None:
        self._mirror = mirror
        self._device = device
        self._router = mirror.router
        self._memory = mirror.router.arena.memory
        self._handles = mirror.handles
        self._files = mirror.files
        self._tree = mirror.tree
        self._attr_timeout = mirror.policy.attributes
        arena = mirror.router.arena
        # For the requests that find no free slot or a full pipe.
        self._local = Transfers(
            arena,
            OwnDescriptors(),
            KernelReplies(device, arena.payload_size),
            mirror.setid,
            OwnIdentity(),
            Counters(memoryview(bytearray(8 * Counters.FIELDS)).cast("Q")),
        )

    def table(self) -> dict[Opcode, Handler]:
        """Return the handlers by opcode."""
        table: dict[Opcode, Handler] = {
            Opcode.OPEN: self.open,
            Opcode.CREATE: self.create,
            Opcode.TMPFILE: self.tmpfile,
            Opcode.READ: self.read,
            Opcode.WRITE: self.write,
            Opcode.RELEASE: self.release,
            Opcode.FLUSH: self.flush,
            Opcode.FSYNC: self.fsync,
            Opcode.FSYNCDIR: self.fsync,
            Opcode.FALLOCATE: self.fallocate,
            Opcode.LSEEK: self.lseek,
            Opcode.COPY_FILE_RANGE: self.copy_file_range,
            Opcode.SYNCFS: self.syncfs,
            Opcode.SETATTR: self.setattr,
            Opcode.STATX: self.statx,
            Opcode.RENAME2: self.rename2,
            Opcode.READDIR: self.readdir,
            Opcode.RELEASEDIR: self.release,
            Opcode.INTERRUPT: self.interrupt,
        }
        capabilities = self._mirror.capabilities
        if capabilities is not None and Feature.SETXATTR_EXT in capabilities.features:
            table[Opcode.SETXATTR] = self.setxattr
        return table

    def _send(self, reply: bytes) -> bool:
        """Write a reply; return False if the kernel no longer waits for it."""
        try:
            os.write(self._device, reply)
        except FileNotFoundError:
            return False
        return True

    # Opening and closing

    def open(self, base: int, length: int) -> None:
        """FUSE_OPEN: reply with a handle and whether the kernel may keep the pages it has."""
        unique, nodeid, flags, open_flags = wire.OPEN_REQUEST.unpack_from(self._memory, base)
        clear_setid = bool(open_flags & wire.FUSE_OPEN_KILL_SUIDGID)
        number, attributes = self._files.open(nodeid, flags, clear_setid)
        mirror = self._mirror
        keep = mirror.policy.open_flags(mirror.inodes.get(nodeid), attributes)
        if not self._send(wire.OPEN_REPLY.pack(wire.OPEN_REPLY.size, 0, unique, number, keep)):
            self._files.release(number)

    def create(self, base: int, length: int) -> None:
        """FUSE_CREATE: reply with an entry and a handle."""
        request = wire.CREATE_REQUEST
        unique, parent, uid, gid, flags, mode, umask, _ = request.unpack_from(self._memory, base)
        name = self._string(base + request.size, base + length)
        created = self._files.create(parent, name, mode, flags, Requester(uid, gid, umask))
        self._reply_created(unique, *created)

    def tmpfile(self, base: int, length: int) -> None:
        """FUSE_TMPFILE: as CREATE; the name is only the kernel's."""
        unique, parent, uid, gid, flags, mode, umask, _ = wire.CREATE_REQUEST.unpack_from(self._memory, base)
        created = self._files.tmpfile(parent, mode, flags, Requester(uid, gid, umask))
        self._reply_created(unique, *created)

    def _reply_created(self, unique: int, number: int, nodeid: int, attributes: Attributes) -> None:
        mirror = self._mirror
        flags = mirror.policy.open_flags(mirror.inodes.get(nodeid), attributes)
        payload = self._entry(nodeid, attributes) + wire.OPEN_OUT.pack(number, flags)
        if not self._send(wire.reply(unique, payload)):
            self._files.release(number)
            self._tree.forget(nodeid, 1)

    def release(self, base: int, length: int) -> None:
        """FUSE_RELEASE and FUSE_RELEASEDIR."""
        unique, number = wire.RELEASE_REQUEST.unpack_from(self._memory, base)
        self._files.release(number)
        self._send(wire.error_reply(unique, 0))

    # Data: the workers answer

    def _submit(
        self,
        number: int,
        operation: Operation,
        unique: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        uid: int = 0,
        gid: int = 0,
        extra: tuple[int, ...] = (),
    ) -> None:
        handle = self._handles.get(number)
        if not self._router.submit(handle, number, operation, unique, offset, length, flags, uid, gid, extra):
            slot = self._router.slot
            self._local.execute(
                Request(operation, unique, slot, number, handle.descriptor, offset, length, flags, uid, gid, extra)
            )

    def read(self, base: int, length: int) -> None:
        """FUSE_READ."""
        unique, number, offset, size, open_flags = wire.READ_REQUEST.unpack_from(self._memory, base)
        buffered = self._handles.get(number).direct and not open_flags & os.O_DIRECT
        self._submit(number, Operation.READ, unique, offset, size, BUFFERED if buffered else 0)

    def write(self, base: int, length: int) -> None:
        """FUSE_WRITE: the payload stays where it is, in the slot."""
        unique, uid, gid, number, offset, size, write_flags, open_flags = wire.WRITE_REQUEST.unpack_from(
            self._memory, base
        )
        flags = KILL_PRIVILEGES if write_flags & wire.FUSE_WRITE_KILL_SUIDGID else 0
        cached = write_flags & wire.FUSE_WRITE_CACHE
        if open_flags & os.O_APPEND and not cached:
            flags |= APPEND
        if self._handles.get(number).direct and (cached or not open_flags & os.O_DIRECT):
            flags |= BUFFERED
        self._submit(number, Operation.WRITE, unique, offset, size, flags, uid, gid)

    def flush(self, base: int, length: int) -> None:
        """FUSE_FLUSH: ENOSYS, after which the kernel stops asking, unless the source's close(2) can fail."""
        unique, number = wire.FLUSH_REQUEST.unpack_from(self._memory, base)
        if self._mirror.close_can_fail:
            self._submit(number, Operation.FLUSH, unique)
        else:
            self._send(wire.error_reply(unique, errno.ENOSYS))

    def fsync(self, base: int, length: int) -> None:
        """FUSE_FSYNC and FUSE_FSYNCDIR."""
        unique, number, fsync_flags = wire.FSYNC_REQUEST.unpack_from(self._memory, base)
        flags = DATA_ONLY if fsync_flags & wire.FUSE_FSYNC_FDATASYNC else 0
        self._submit(number, Operation.FSYNC, unique, flags=flags)

    def fallocate(self, base: int, length: int) -> None:
        """FUSE_FALLOCATE."""
        unique, uid, gid, number, offset, size, mode = wire.FALLOCATE_REQUEST.unpack_from(self._memory, base)
        self._submit(number, Operation.FALLOCATE, unique, offset, size, _kill_flag(uid), uid, gid, (mode,))

    def lseek(self, base: int, length: int) -> None:
        """FUSE_LSEEK: only SEEK_HOLE and SEEK_DATA are sent."""
        unique, number, offset, whence = wire.LSEEK_REQUEST.unpack_from(self._memory, base)
        self._submit(number, Operation.LSEEK, unique, offset, extra=(whence,))

    def copy_file_range(self, base: int, length: int) -> None:
        """FUSE_COPY_FILE_RANGE: the worker of the file written to does it."""
        unique, uid, gid, source, source_offset, number, offset, size = wire.COPY_FILE_RANGE_REQUEST.unpack_from(
            self._memory, base
        )
        source_handle = self._handles.get(source)
        source_handle.shared = True
        extra = (source, source_handle.descriptor, source_offset)
        self._submit(number, Operation.COPY_FILE_RANGE, unique, offset, size, _kill_flag(uid), uid, gid, extra)

    def syncfs(self, base: int, length: int) -> None:
        """FUSE_SYNCFS: answered by a worker through a descriptor of the root."""
        unique, _ = wire.SYNCFS_REQUEST.unpack_from(self._memory, base)
        self._submit(self._files.root_handle(), Operation.SYNCFS, unique)

    # Names and attributes

    def setattr(self, base: int, length: int) -> None:
        """FUSE_SETATTR."""
        unique, nodeid, caller, valid, number, size, atime, mtime, atime_nsec, mtime_nsec, mode, uid, gid = (
            wire.SETATTR_REQUEST.unpack_from(self._memory, base)
        )
        changes = Changes(valid, mode, uid, gid, size, (atime, atime_nsec), (mtime, mtime_nsec))
        handle = number if valid & wire.FATTR_FH else None
        attributes = self._tree.setattr(nodeid, changes, handle, privileged=caller == 0)
        header = wire.ATTR_REPLY.pack(wire.ATTR_REPLY.size + wire.ATTR.size, 0, unique, *self._attr_timeout)
        self._send(header + encode_attributes(nodeid, attributes))

    def statx(self, base: int, length: int) -> None:
        """FUSE_STATX: sent where somebody asks for the birth time."""
        unique, nodeid, _, _, flags, mask = wire.STATX_REQUEST.unpack_from(self._memory, base)
        raw = self._tree.statx_raw(nodeid, mask, flags)
        self._send(wire.reply(unique, wire.STATX_OUT.pack(*self._attr_timeout, 0) + bytes(raw)))

    def rename2(self, base: int, length: int) -> None:
        """FUSE_RENAME2: rename with flags."""
        request = wire.RENAME2_REQUEST
        unique, parent, new_parent, flags = request.unpack_from(self._memory, base)
        name = self._string(base + request.size, base + length)
        new_name = self._string(base + request.size + len(name) + 1, base + length)
        self._tree.rename(parent, name, new_parent, new_name, flags)
        self._send(wire.error_reply(unique, 0))

    def setxattr(self, base: int, length: int) -> None:
        """FUSE_SETXATTR in its extended form (SETXATTR_EXT)."""
        request = wire.SETXATTR_REQUEST
        unique, nodeid, size, flags, xattr_flags, _ = request.unpack_from(self._memory, base)
        if not self._mirror.config.xattr:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        name = self._string(base + request.size, base + length)
        start = base + request.size + len(name) + 1
        value = self._memory[start : start + size]
        self._tree.setxattr(nodeid, name, value, flags, bool(xattr_flags & wire.FUSE_SETXATTR_ACL_KILL_SGID))
        self._send(wire.error_reply(unique, 0))

    def readdir(self, base: int, length: int) -> None:
        """FUSE_READDIR: as many entries as fit, from the cookie on, which is the number of entries already had."""
        unique, number, offset, size = wire.READDIR_REQUEST.unpack_from(self._memory, base)
        entries = self._files.entries(number, offset)
        reply = bytearray(wire.OUT_HEADER_SIZE)
        limit = wire.OUT_HEADER_SIZE + size
        pack = wire.DIRENT.pack
        for position in range(offset, len(entries)):
            ino, kind, name = entries[position]
            end = len(reply) + wire.pad8(wire.DIRENT.size + len(name))
            if end > limit:
                break
            reply += pack(ino, position + 1, len(name), kind)
            reply += name
            reply += bytes(end - len(reply))
        wire.OUT_HEADER.pack_into(reply, 0, len(reply), 0, unique)
        self._send(bytes(reply))

    def interrupt(self, base: int, length: int) -> None:
        """FUSE_INTERRUPT: not supported, as said once."""
        (unique,) = wire.UNIQUE.unpack_from(self._memory, base)
        self._send(wire.error_reply(unique, errno.ENOSYS))

    # Encoding

    def _string(self, start: int, limit: int) -> bytes:
        """Return the NUL-terminated string at *start*."""
        end = self._memory.find(b"\0", start, limit)
        if end < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._memory[start:end]

    def _entry(self, nodeid: int, attributes: Attributes) -> bytes:
        policy = self._mirror.policy
        entry, entry_nsec = policy.entry
        valid, valid_nsec = policy.attributes
        head = wire.ENTRY.pack(nodeid, attributes.birth, entry, valid, entry_nsec, valid_nsec)
        return head + encode_attributes(nodeid, attributes)


def _kill_flag(uid: int) -> int:
    """Guess from the user id what some requests do not say: whether the caller lacks CAP_FSETID."""
    return KILL_PRIVILEGES if uid else 0


def encode_attributes(nodeid: int, attributes: Attributes) -> bytes:
    """Return ``struct fuse_attr`` for an inode."""
    return wire.ATTR.pack(
        nodeid,
        attributes.size,
        attributes.blocks,
        attributes.atime,
        attributes.mtime,
        attributes.ctime,
        attributes.atime_nsec,
        attributes.mtime_nsec,
        attributes.ctime_nsec,
        attributes.mode,
        attributes.nlink,
        attributes.uid,
        attributes.gid,
        wire.encode_device(attributes.rdev_major, attributes.rdev_minor),
        attributes.blksize,
        0,
    )
