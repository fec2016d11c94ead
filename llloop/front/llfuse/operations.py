"""The handlers that llfuse calls with ``--loop llfuse``, one method for each request.

An exception other than FUSEError would end llfuse's loop. So `_answered` turns all others into an errno.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from stat import S_ISSOCK
from typing import Any, TypeVar

import llfuse
from llfuse import EntryAttributes, FUSEError, RequestContext, SetattrFields

from llloop.front.context import Context
from llloop.front.inodes import ROOT
from llloop.front.llfuse.exchange import Exchange
from llloop.front.llfuse.invalidation import Invalidator
from llloop.front.requester import Requester
from llloop.front.tree import Changes
from llloop.linux import fuse
from llloop.linux.fuse import Opcode
from llloop.linux.syscalls import Attributes, DirectoryEntry
from llloop.shared.messages import APPEND, DATA_ONLY, Operation

_log = logging.getLogger(__name__)
_Method = TypeVar("_Method", bound=Callable[..., Any])
# llfuse does not tell which writes are direct, and writeback of a mapping must not be. So files are opened without
# O_DIRECT in the source; the kernel bypasses its own page cache nevertheless.
_DIRECT = os.O_DIRECT
_NS = 1_000_000_000
# Times this close to the current time, in nanoseconds, count as UTIME_NOW.
_NOW = 2 * _NS


def _answered(method: _Method) -> _Method:
    """Decorate a handler so that it only raises FUSEError; unexpected exceptions are logged and become EIO.

    It raises a new exception: one that is raised again keeps its traceback, and with it all frames and payloads.
    """
    opcode = int(Opcode[method.__name__.strip("_").upper()])

    @functools.wraps(method)
    def handler(self: Any, *args: Any) -> Any:
        self._begin()
        number = 0
        try:
            return method(self, *args)
        except FUSEError as error:
            number = error.errno
        except OSError as error:
            number = error.errno or errno.EIO
        except Exception:
            _log.exception("%s%r failed", method.__name__, args)
            number = errno.EIO
        finally:
            self._finish(opcode, number)
        raise FUSEError(fuse.known_errno(number))

    return handler  # type: ignore[return-value]


# The requester of calls that llfuse makes without a context.
_SERVER = Requester(0, 0)


def _requester(context: RequestContext) -> Requester:
    return Requester(context.uid, context.gid, context.umask, context.pid)


class Operations(llfuse.Operations):  # type: ignore[misc]
    """The handlers.

    llfuse needs this object before the mount exists. In the front, `attach` sets what it serves.
    """

    _context: Context
    _exchange: Exchange
    _invalidator: Invalidator

    def attach(self, context: Context, exchange: Exchange, device: int) -> None:
        """Serve *context*, waiting for the answers of workers by *exchange*."""
        self._context = context
        self._exchange = exchange
        self._invalidator = Invalidator(device)
        self._sheet = context.router.slots.metrics.front
        self._calls = 0

    def _begin(self) -> None:
        """Note when the front took a request."""
        self._exchange.request.taken = time.monotonic_ns()
        self._calls = self._exchange.calls

    def _finish(self, opcode: int, number: int) -> None:
        """Count a request that ended with errno *number* or 0, unless a worker has done and counted it."""
        closing = self._context.closing
        while closing:
            os.close(closing.pop())
        if self._exchange.calls != self._calls:
            return
        self._sheet.finished(opcode, time.monotonic_ns() - self._exchange.request.taken)
        if number:
            self._sheet.failed(opcode, number)

    def init(self) -> None:
        """Do nothing, because libfuse has answered INIT."""

    def destroy(self) -> None:
        """Do nothing, because the supervisor ends the processes."""

    def _entry(self, nodeid: int, attributes: Attributes) -> EntryAttributes:
        entry = self._attributes(nodeid, attributes)
        # llfuse has one field for the nodeid and the shown inode number. So these attributes expire at once, and the
        # kernel asks for others (GETATTR) before it shows them. A reply to GETATTR has no nodeid.
        entry.st_ino = nodeid
        entry.attr_timeout = 0
        self._context.inodes.count(nodeid)
        entry.entry_timeout = self._context.config.entry_timeout
        return entry

    def _attributes(self, nodeid: int, attributes: Attributes) -> EntryAttributes:
        entry = EntryAttributes()
        # The kernel finds a socket by the inode number that it had at bind(2) (net/unix/af_unix.c, unix_bsd_hash()).
        # That is the number in an entry, the nodeid.
        shown = self._context.inodes.shown
        entry.st_ino = nodeid if S_ISSOCK(attributes.mode) else shown(attributes.device, attributes.ino)
        entry.attr_timeout = self._context.config.attr_timeout
        entry.st_mode = attributes.mode
        entry.st_nlink = attributes.nlink
        entry.st_uid = attributes.uid
        entry.st_gid = attributes.gid
        entry.st_rdev = fuse.encode_device(attributes.rdev_major, attributes.rdev_minor)
        entry.st_size = attributes.size
        entry.st_blksize = attributes.blksize
        entry.st_blocks = attributes.blocks
        entry.st_atime_ns = attributes.atime * _NS + attributes.atime_nsec
        entry.st_mtime_ns = attributes.mtime * _NS + attributes.mtime_nsec
        entry.st_ctime_ns = attributes.ctime * _NS + attributes.ctime_nsec
        return entry

    # Names

    @_answered
    def lookup(self, parent: int, name: bytes, context: RequestContext) -> EntryAttributes:
        found = self._context.tree.find(parent, name)
        if found is not None:
            return self._entry(*found)
        if not self._context.config.negative_timeout:
            raise FUSEError(errno.ENOENT)
        negative = EntryAttributes()
        negative.st_ino = 0
        negative.entry_timeout = self._context.config.negative_timeout
        return negative

    def forget(self, inodes: list[tuple[int, int]]) -> None:
        """Forget inodes. It must not raise any exception, because FORGET has no reply."""
        for nodeid, lookups in inodes:
            try:
                self._context.tree.forget(nodeid, lookups)
            except Exception:
                _log.exception("forget(%d, %d) failed", nodeid, lookups)
        closing = self._context.closing
        while closing:
            os.close(closing.pop())

    @_answered
    def mknod(self, parent: int, name: bytes, mode: int, device: int, context: RequestContext) -> EntryAttributes:
        return self._entry(*self._context.tree.mknod(parent, name, mode, device, _requester(context)))

    @_answered
    def mkdir(self, parent: int, name: bytes, mode: int, context: RequestContext) -> EntryAttributes:
        return self._entry(*self._context.tree.mkdir(parent, name, mode, _requester(context)))

    @_answered
    def symlink(self, parent: int, name: bytes, target: bytes, context: RequestContext) -> EntryAttributes:
        return self._entry(*self._context.tree.symlink(parent, name, target, _requester(context)))

    @_answered
    def link(self, nodeid: int, parent: int, name: bytes, context: RequestContext) -> EntryAttributes:
        return self._entry(*self._context.tree.link(nodeid, parent, name, _requester(context)))

    @_answered
    def unlink(self, parent: int, name: bytes, context: RequestContext) -> None:
        self._context.tree.unlink(parent, name, _requester(context))

    @_answered
    def rmdir(self, parent: int, name: bytes, context: RequestContext) -> None:
        self._context.tree.rmdir(parent, name, _requester(context))

    @_answered
    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, context: RequestContext) -> None:
        self._context.tree.rename(parent, name, new_parent, new_name, 0, _requester(context))

    @_answered
    def readlink(self, nodeid: int, context: RequestContext) -> bytes:
        return self._context.tree.readlink(nodeid)

    # Attributes

    @_answered
    def getattr(self, nodeid: int, context: RequestContext) -> EntryAttributes:
        return self._attributes(nodeid, self._context.tree.getattr(nodeid))

    @_answered
    def setattr(
        self, nodeid: int, values: EntryAttributes, fields: SetattrFields, handle: int | None, context: RequestContext
    ) -> EntryAttributes:
        valid = 0
        for wanted, bit in (
            (fields.update_mode, fuse.FATTR_MODE),
            (fields.update_uid, fuse.FATTR_UID),
            (fields.update_gid, fuse.FATTR_GID),
            (fields.update_size, fuse.FATTR_SIZE),
            (fields.update_atime, fuse.FATTR_ATIME),
            (fields.update_mtime, fuse.FATTR_MTIME),
        ):
            valid |= bit if wanted else 0
        # llfuse does not pass on UTIME_NOW, but the kernel then sends the same current time for both.
        is_now = values.st_atime_ns == values.st_mtime_ns and abs(time.time_ns() - values.st_mtime_ns) < _NOW
        if fields.update_atime and fields.update_mtime and is_now:
            valid |= fuse.FATTR_ATIME_NOW | fuse.FATTR_MTIME_NOW
        changes = Changes(
            valid=valid,
            mode=values.st_mode,
            uid=values.st_uid,
            gid=values.st_gid,
            size=values.st_size,
            atime=divmod(values.st_atime_ns, _NS),
            mtime=divmod(values.st_mtime_ns, _NS),
        )
        return self._attributes(nodeid, self._context.tree.setattr(nodeid, changes, handle, _requester(context)))

    @_answered
    def access(self, nodeid: int, mode: int, context: RequestContext) -> bool:
        """Return True: the mount has default_permissions, so the kernel checks permissions itself."""
        return True

    @_answered
    def statfs(self, context: RequestContext) -> llfuse.StatvfsData:
        state = self._context.tree.statfs(ROOT)
        data = llfuse.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(data, name, getattr(state, name))
        data.f_namemax = state.f_namemax
        return data

    # Extended attributes

    def _check_xattr(self) -> None:
        if not self._context.config.xattr:
            raise FUSEError(errno.ENOSYS)  # the kernel then stops asking and says EOPNOTSUPP itself

    @_answered
    def setxattr(self, nodeid: int, name: bytes, value: bytes, context: RequestContext) -> None:
        self._check_xattr()
        self._context.tree.setxattr(nodeid, name, value, 0, _requester(context), kill_sgid=False)

    @_answered
    def getxattr(self, nodeid: int, name: bytes, context: RequestContext | None = None) -> bytes:
        """Return an attribute's value. For XATTR_CREATE and XATTR_REPLACE, llfuse calls this without a context."""
        self._check_xattr()
        who = _requester(context) if context is not None else _SERVER
        return self._context.tree.getxattr(nodeid, name, who)

    @_answered
    def listxattr(self, nodeid: int, context: RequestContext) -> list[bytes]:
        self._check_xattr()
        return self._context.tree.listxattr(nodeid, _requester(context))

    @_answered
    def removexattr(self, nodeid: int, name: bytes, context: RequestContext) -> None:
        self._check_xattr()
        self._context.tree.removexattr(nodeid, name, _requester(context))

    # Directories

    @_answered
    def opendir(self, nodeid: int, context: RequestContext) -> int:
        return self._context.files.opendir(nodeid, _requester(context))[0]

    def readdir(self, handle: int, offset: int) -> Iterator[tuple[bytes, EntryAttributes, int]]:
        return iter(self._readdir(handle, offset))

    @_answered
    def _readdir(self, handle: int, offset: int) -> Iterator[tuple[bytes, EntryAttributes, int]]:
        entries = self._context.files.entries(handle, offset)
        return map(self._directory_entry, range(offset, len(entries)), entries[offset:])

    def _directory_entry(self, position: int, entry: DirectoryEntry) -> tuple[bytes, EntryAttributes, int]:
        number, kind, name = entry
        attributes = EntryAttributes()
        attributes.st_ino = number
        attributes.st_mode = kind << 12  # DTTOIF of <dirent.h>
        return name, attributes, position + 1

    @_answered
    def releasedir(self, handle: int) -> None:
        self._context.files.release(handle)

    # Files

    def _ask(self, number: int, operation: Operation, offset: int = 0, length: int = 0, flags: int = 0) -> Any:
        return self._exchange.call(self._context.handles.get(number), number, operation, offset, length, flags)

    def _note_append(self, handle: int, flags: int) -> None:
        self._context.handles.get(handle).append = bool(flags & os.O_APPEND)

    @_answered
    def open(self, nodeid: int, flags: int, context: RequestContext) -> int:
        handle, attributes = self._context.files.open(nodeid, flags & ~_DIRECT, False, _requester(context))
        self._note_append(handle, flags)
        if not self._context.policy.open_flags(self._context.inodes, nodeid, attributes) & fuse.FOPEN_KEEP_CACHE:
            self._invalidator.drop_pages(nodeid)  # llfuse makes the kernel keep them at every open
        return handle

    @_answered
    def create(
        self, parent: int, name: bytes, mode: int, flags: int, context: RequestContext
    ) -> tuple[int, EntryAttributes]:
        handle, nodeid, attributes = self._context.files.create(
            parent, name, mode, flags & ~_DIRECT, _requester(context)
        )
        self._note_append(handle, flags)
        return handle, self._entry(nodeid, attributes)

    @_answered
    def read(self, handle: int, offset: int, length: int) -> memoryview:
        count, data = self._ask(handle, Operation.READ, offset, length)
        return memoryview(data)[:count]

    @_answered
    def write(self, handle: int, offset: int, payload: bytes) -> int:
        open_file = self._context.handles.get(handle)
        flags = APPEND if open_file.append else 0
        count, _ = self._exchange.call(
            open_file, handle, Operation.WRITE, offset, len(payload), flags, *open_file.opener, payload
        )
        return count

    @_answered
    def flush(self, handle: int) -> None:
        if not self._context.close_can_fail:
            raise FUSEError(errno.ENOSYS)  # the kernel then stops asking
        self._ask(handle, Operation.FLUSH)

    @_answered
    def fsync(self, handle: int, data_only: bool) -> None:
        self._ask(handle, Operation.FSYNC, flags=DATA_ONLY if data_only else 0)

    fsyncdir = fsync

    @_answered
    def release(self, handle: int) -> None:
        self._context.files.release(handle)

    def stacktrace(self) -> None:
        """Do nothing: otherwise any user could print stacks by setting the attribute fuse_stacktrace of the root."""


assert ROOT == llfuse.ROOT_INODE
