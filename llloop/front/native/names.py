"""Names and attributes: what `find`, builds and `git status` are made of."""

from __future__ import annotations

import errno
import os

from ... import wire
from ...syscalls import Attributes, fstatx
from ..mirror import Mirror
from ..requester import Requester
from ..tree import Changes
from .base import Responder
from .recent import RecentLookups


class NameRequests(Responder):
    """The handlers; see `Responder`. *recent* is told of lookups."""

    def __init__(self, mirror: Mirror, device: int, recent: RecentLookups) -> None:
        super().__init__(mirror, device)
        self._recent = recent
        self._router = mirror.router
        self._forgetting = mirror.forgetting
        seconds, nanoseconds = mirror.policy.negative
        # struct fuse_entry_out of a name that does not exist; empty where the kernel is not to remember that.
        self._negative = wire.ENTRY_HEAD.pack(0, 0, seconds, 0, nanoseconds, 0) + bytes(wire.ATTR.size)
        if not seconds and not nanoseconds:
            self._negative = b""

    def lookup(self, base: int, length: int) -> None:
        """FUSE_LOOKUP."""
        unique, parent = wire.NODE_REQUEST.unpack_from(self._memory, base)
        name = self._name(base, length)
        found = self._tree.find(parent, name)
        if found is not None:
            self._reply_entry(unique, *found)
            self._recent.note(parent, self._router.taken)
        elif self._negative:
            self._send(wire.reply(unique, self._negative))
        else:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def forget(self, base: int, length: int) -> None:
        """FUSE_FORGET and FUSE_BATCH_FORGET: have no reply."""
        self._forgetting.forget(base, length)

    def getattr(self, base: int, length: int) -> None:
        """FUSE_GETATTR."""
        unique, nodeid, flags, number = wire.GETATTR_REQUEST.unpack_from(self._memory, base)
        if flags & wire.FUSE_GETATTR_FH:
            attributes = fstatx(self._handles.get(number).descriptor)
        else:
            attributes = self._tree.getattr(nodeid)
        self._reply_attributes(unique, attributes)

    def _reply_attributes(self, unique: int, attributes: Attributes) -> None:
        self._send(self._attributes_reply(unique, attributes))

    def setattr(self, base: int, length: int) -> None:
        """FUSE_SETATTR."""
        unique, nodeid, uid, gid, pid, valid, number, size, *times, mode, new_uid, new_gid = (
            wire.SETATTR_REQUEST.unpack_from(self._memory, base)
        )
        atime, mtime, ctime = zip(times[:3], times[3:], strict=True)
        changes = Changes(valid, mode, new_uid, new_gid, size, atime, mtime, ctime)
        handle = number if valid & wire.FATTR_FH else None
        attributes = self._tree.setattr(nodeid, changes, handle, Requester(uid, gid, pid=pid))
        self._reply_attributes(unique, attributes)

    def statx(self, base: int, length: int) -> None:
        """FUSE_STATX: sent where somebody asks for the birth time."""
        unique, nodeid, getattr_flags, number, flags, mask = wire.STATX_REQUEST.unpack_from(self._memory, base)
        handle = self._handles.get(number) if getattr_flags & wire.FUSE_GETATTR_FH else None
        raw = self._tree.statx_raw(nodeid, mask, flags, handle)
        self._send(wire.reply(unique, wire.STATX_OUT.pack(*self._attr_timeout, 0) + bytes(raw)))

    def readlink(self, base: int, length: int) -> None:
        """FUSE_READLINK."""
        unique, nodeid = wire.NODE_REQUEST.unpack_from(self._memory, base)
        self._send(wire.reply(unique, self._tree.readlink(nodeid)))

    def statfs(self, base: int, length: int) -> None:
        """FUSE_STATFS."""
        unique, nodeid = wire.NODE_REQUEST.unpack_from(self._memory, base)
        state = self._tree.statfs(nodeid)
        payload = wire.STATFS_OUT.pack(
            state.f_blocks,
            state.f_bfree,
            state.f_bavail,
            state.f_files,
            state.f_ffree,
            state.f_bsize,
            state.f_namemax,
            state.f_frsize,
        )
        self._send(wire.reply(unique, payload))
