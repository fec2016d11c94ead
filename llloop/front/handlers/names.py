"""LOOKUP, FORGET, GETATTR, SETATTR, STATX, READLINK and STATFS."""

from __future__ import annotations

import errno
import os
import sys

from llloop.front.context import Context
from llloop.front.handlers.base import Responder
from llloop.front.handlers.recent_lookups import RecentLookups
from llloop.front.open_files import Handle
from llloop.front.request import FuseRequest
from llloop.front.tree import Changes
from llloop.linux import fuse
from llloop.linux.syscalls import Attributes, fstatx
from llloop.shared.messages import Operation


class NameRequests(Responder):
    """The handlers, see `Responder`. *recent* counts lookups."""

    def __init__(self, context: Context, device: int, recent: RecentLookups) -> None:
        super().__init__(context, device)
        self._recent = recent
        self._router = context.router
        self._forgetting = context.forgetting

    def lookup(self, request: FuseRequest) -> None:
        """FUSE_LOOKUP."""
        found = self._tree.find(request.nodeid, request.name())
        if found is not None:
            self._reply_entry(request.unique, *found)
            self._recent.note(request.nodeid, request.taken)
        else:
            heard = self._heard
            negative = (self._validity if heard is None else heard.of_missing(request.nodeid)).negative
            if not negative:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._send(fuse.reply(request.unique, negative))

    def forget(self, request: FuseRequest) -> None:
        """FUSE_FORGET and FUSE_BATCH_FORGET: without reply."""
        self._forgetting.forget(request)

    def getattr(self, request: FuseRequest) -> None:
        """FUSE_GETATTR."""
        flags, number = fuse.GETATTR_REQUEST.unpack_from(self._memory, request.base)
        if flags & fuse.FUSE_GETATTR_FH:
            attributes = fstatx(self._handles.get(number).descriptor)
        else:
            attributes = self._tree.getattr(request.nodeid)
        self._reply_attributes(request, attributes)

    def _reply_attributes(self, request: FuseRequest, attributes: Attributes, *, lasting: bool = True) -> None:
        nodeid = request.nodeid
        reply = self._attributes_reply(request.unique, nodeid, attributes, lasting=lasting)
        pages = self._written.get(nodeid)
        if pages is not None and self._router.is_unanswered(pages.invalidation):
            # New attributes make the kernel read pages again. It must not find pages that are still to be dropped, so
            # a worker sends the reply after they are.
            target = Handle(-1, nodeid, self._router.shard_of(nodeid), 0)
            self._router.dispatch(request, target, 0, Operation.GETATTR, extra=(nodeid, reply))
        else:
            self._send(reply)

    def setattr(self, request: FuseRequest) -> None:
        """FUSE_SETATTR."""
        valid, number, size, *times, mode, uid, gid = fuse.SETATTR_REQUEST.unpack_from(self._memory, request.base)
        atime, mtime, ctime = zip(times[:3], times[3:], strict=True)
        changes = Changes(valid, mode, uid, gid, size, atime, mtime, ctime)
        handle = number if valid & fuse.FATTR_FH else None
        attributes = self._tree.setattr(request.nodeid, changes, handle, request.caller())
        # The kernel takes the attributes in a reply to SETATTR even if it was told meanwhile that they have changed.
        self._reply_attributes(request, attributes, lasting=self._heard is None)

    def statx(self, request: FuseRequest) -> None:
        """FUSE_STATX: the kernel sends it if a program asks for the birth time."""
        getattr_flags, number, flags, mask = fuse.STATX_REQUEST.unpack_from(self._memory, request.base)
        nodeid = request.nodeid
        handle = self._handles.get(number) if getattr_flags & fuse.FUSE_GETATTR_FH else None
        raw = self._tree.statx_raw(nodeid, mask, flags, handle)
        valid = 0, 0
        heard = self._heard
        if nodeid not in self._written:
            valid = (self._validity if heard is None else heard.of_statx(nodeid)).attributes
        else:
            size, blocks = fuse.STATX_SIZE_AND_BLOCKS.unpack_from(raw)
            if not blocks and self._can_get_blocks(nodeid, size):
                raw[fuse.STATX_BLOCKS_OFFSET : fuse.STATX_BLOCKS_OFFSET + 8] = (1).to_bytes(8, sys.byteorder)
        self._send(fuse.reply(request.unique, fuse.STATX_OUT.pack(*valid, 0) + bytes(raw)))

    def readlink(self, request: FuseRequest) -> None:
        """FUSE_READLINK."""
        self._send(fuse.reply(request.unique, self._tree.readlink(request.nodeid)))

    def statfs(self, request: FuseRequest) -> None:
        """FUSE_STATFS."""
        state = self._tree.statfs(request.nodeid)
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
        self._send(fuse.reply(request.unique, payload))
