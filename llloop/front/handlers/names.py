"""Names and attributes: what `find`, builds and `git status` are made of."""

from __future__ import annotations

import errno
import os
import sys

from llloop.front.context import Context
from llloop.front.handlers.base import Responder
from llloop.front.handlers.recent_lookups import RecentLookups
from llloop.front.open_files import Handle
from llloop.front.requester import Requester
from llloop.front.router import Task
from llloop.front.tree import Changes
from llloop.linux import fuse
from llloop.linux.syscalls import Attributes, fstatx
from llloop.shared.messages import Operation


class NameRequests(Responder):
    """The handlers; see `Responder`. *recent* is told of lookups."""

    def __init__(self, context: Context, device: int, recent: RecentLookups) -> None:
        super().__init__(context, device)
        self._recent = recent
        self._router = context.router
        self._forgetting = context.forgetting
        seconds, nanoseconds = context.policy.negative
        # struct fuse_entry_out of a name that does not exist; empty where the kernel is not to remember that.
        self._negative = fuse.ENTRY_HEAD.pack(0, 0, seconds, 0, nanoseconds, 0) + bytes(fuse.ATTR.size)
        if not seconds and not nanoseconds:
            self._negative = b""

    def lookup(self, base: int, length: int) -> None:
        """FUSE_LOOKUP."""
        unique, parent = fuse.NODE_REQUEST.unpack_from(self._memory, base)
        name = self._name(base, length)
        found = self._tree.find(parent, name)
        if found is not None:
            self._reply_entry(unique, *found)
            self._recent.note(parent, self._router.taken)
        elif self._negative:
            self._send(fuse.reply(unique, self._negative))
        else:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def forget(self, base: int, length: int) -> None:
        """FUSE_FORGET and FUSE_BATCH_FORGET: have no reply."""
        self._forgetting.forget(base, length)

    def getattr(self, base: int, length: int) -> None:
        """FUSE_GETATTR."""
        unique, nodeid, flags, number = fuse.GETATTR_REQUEST.unpack_from(self._memory, base)
        if flags & fuse.FUSE_GETATTR_FH:
            attributes = fstatx(self._handles.get(number).descriptor)
        else:
            attributes = self._tree.getattr(nodeid)
        self._reply_attributes(unique, nodeid, attributes)

    def _reply_attributes(self, unique: int, nodeid: int, attributes: Attributes) -> None:
        reply = self._attributes_reply(unique, nodeid, attributes)
        pages = self._written.get(nodeid)
        if pages is not None and self._router.is_unanswered(pages.invalidation):
            # With new attributes the kernel reads pages again, of which those that are being dropped must not be found.
            errand = Handle(-1, nodeid, self._router.shard_of(nodeid), 0)
            self._router.entrust(Task(errand, 0, Operation.GETATTR, unique, extra=(nodeid, reply)))
        else:
            self._send(reply)

    def setattr(self, base: int, length: int) -> None:
        """FUSE_SETATTR."""
        unique, nodeid, uid, gid, pid, valid, number, size, *times, mode, new_uid, new_gid = (
            fuse.SETATTR_REQUEST.unpack_from(self._memory, base)
        )
        atime, mtime, ctime = zip(times[:3], times[3:], strict=True)
        changes = Changes(valid, mode, new_uid, new_gid, size, atime, mtime, ctime)
        handle = number if valid & fuse.FATTR_FH else None
        attributes = self._tree.setattr(nodeid, changes, handle, Requester(uid, gid, pid=pid))
        self._reply_attributes(unique, nodeid, attributes)

    def statx(self, base: int, length: int) -> None:
        """FUSE_STATX: sent where somebody asks for the birth time."""
        unique, nodeid, getattr_flags, number, flags, mask = fuse.STATX_REQUEST.unpack_from(self._memory, base)
        handle = self._handles.get(number) if getattr_flags & fuse.FUSE_GETATTR_FH else None
        raw = self._tree.statx_raw(nodeid, mask, flags, handle)
        valid = self._attr_timeout
        if nodeid in self._written:
            valid = 0, 0
            size, blocks = fuse.STATX_SIZE_AND_BLOCKS.unpack_from(raw)
            if not blocks and self._can_get_blocks(nodeid, size):
                raw[fuse.STATX_BLOCKS_OFFSET : fuse.STATX_BLOCKS_OFFSET + 8] = (1).to_bytes(8, sys.byteorder)
        self._send(fuse.reply(unique, fuse.STATX_OUT.pack(*valid, 0) + bytes(raw)))

    def readlink(self, base: int, length: int) -> None:
        """FUSE_READLINK."""
        unique, nodeid = fuse.NODE_REQUEST.unpack_from(self._memory, base)
        self._send(fuse.reply(unique, self._tree.readlink(nodeid)))

    def statfs(self, base: int, length: int) -> None:
        """FUSE_STATFS."""
        unique, nodeid = fuse.NODE_REQUEST.unpack_from(self._memory, base)
        state = self._tree.statfs(nodeid)
        payload = fuse.STATFS_OUT.pack(
            state.f_blocks,
            state.f_bfree,
            state.f_bavail,
            state.f_files,
            state.f_ffree,
            state.f_bsize,
            state.f_namemax,
            state.f_frsize,
        )
        self._send(fuse.reply(unique, payload))
