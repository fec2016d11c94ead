"""Requests that change the tree: MKNOD, MKDIR, SYMLINK, LINK, UNLINK, RMDIR, RENAME, SETXATTR, REMOVEXATTR."""

from __future__ import annotations

import os

from llloop.front.handlers.base import Responder
from llloop.front.request import FuseRequest
from llloop.linux import fuse, syscalls
from llloop.shared.negotiation import Feature


class MutationRequests(Responder):
    """The handlers, see `Responder`."""

    def mknod(self, request: FuseRequest) -> None:
        """FUSE_MKNOD."""
        mode, device, umask = fuse.MKNOD_REQUEST.unpack_from(self._memory, request.base)
        name = request.string(fuse.MKNOD_REQUEST.size)
        number = os.makedev(*fuse.decode_device(device))
        entry = self._tree.mknod(request.nodeid, name, mode, number, request.creator(umask))
        self._reply_entry(request.unique, *entry)

    def mkdir(self, request: FuseRequest) -> None:
        """FUSE_MKDIR."""
        mode, umask = fuse.MKDIR_REQUEST.unpack_from(self._memory, request.base)
        name = request.string(fuse.MKDIR_REQUEST.size)
        self._reply_entry(request.unique, *self._tree.mkdir(request.nodeid, name, mode, request.creator(umask)))

    def symlink(self, request: FuseRequest) -> None:
        """FUSE_SYMLINK."""
        name, target = request.strings(fuse.IN_HEADER_SIZE)
        self._reply_entry(request.unique, *self._tree.symlink(request.nodeid, name, target, request.creator()))

    def link(self, request: FuseRequest) -> None:
        """FUSE_LINK."""
        (nodeid,) = fuse.LINK_REQUEST.unpack_from(self._memory, request.base)
        name = request.string(fuse.LINK_REQUEST.size)
        linked, attributes = self._tree.link(nodeid, request.nodeid, name, request.caller())
        # As in the reply to SETATTR.
        self._reply_entry(request.unique, linked, attributes, lasting=self._heard is None)

    def unlink(self, request: FuseRequest) -> None:
        """FUSE_UNLINK."""
        self._tree.unlink(request.nodeid, request.name(), request.caller())
        self._send(fuse.error_reply(request.unique, 0))

    def rmdir(self, request: FuseRequest) -> None:
        """FUSE_RMDIR."""
        self._tree.rmdir(request.nodeid, request.name(), request.caller())
        self._send(fuse.error_reply(request.unique, 0))

    def rename(self, request: FuseRequest) -> None:
        """FUSE_RENAME."""
        (new_parent,) = fuse.RENAME_REQUEST.unpack_from(self._memory, request.base)
        name, new_name = request.strings(fuse.RENAME_REQUEST.size)
        self._tree.rename(request.nodeid, name, new_parent, new_name, 0, request.caller())
        self._send(fuse.error_reply(request.unique, 0))

    def rename2(self, request: FuseRequest) -> None:
        """FUSE_RENAME2: rename with flags."""
        new_parent, flags = fuse.RENAME2_REQUEST.unpack_from(self._memory, request.base)
        name, new_name = request.strings(fuse.RENAME2_REQUEST.size)
        who = request.creator() if flags & syscalls.RENAME_WHITEOUT else request.caller()
        self._tree.rename(request.nodeid, name, new_parent, new_name, flags, who)
        self._send(fuse.error_reply(request.unique, 0))

    def setxattr(self, request: FuseRequest) -> None:
        """FUSE_SETXATTR."""
        self._check_xattr()
        name, value, flags, kill_sgid = self.setxattr_arguments(request)
        self._tree.setxattr(request.nodeid, name, value, flags, request.caller(), kill_sgid=kill_sgid)
        self._send(fuse.error_reply(request.unique, 0))

    def setxattr_arguments(self, request: FuseRequest) -> tuple[bytes, bytes, int, bool]:
        """Return name, value and flags of a FUSE_SETXATTR, and whether an ACL clears the set-group-ID bit.

        The request has the extended struct if that was negotiated (FUSE_SETXATTR_EXT, Linux 5.14).
        """
        if Feature.SETXATTR_EXT in self._context.features:
            layout = fuse.SETXATTR_REQUEST
            size, flags, xattr_flags, _ = layout.unpack_from(self._memory, request.base)
        else:
            layout = fuse.SHORT_SETXATTR_REQUEST
            size, flags = layout.unpack_from(self._memory, request.base)
            xattr_flags = 0
        name = request.string(layout.size)
        value = request.payload(layout.size + len(name) + 1, size)
        return name, value, flags, bool(xattr_flags & fuse.FUSE_SETXATTR_ACL_KILL_SGID)

    def removexattr(self, request: FuseRequest) -> None:
        """FUSE_REMOVEXATTR."""
        self._check_xattr()
        self._tree.removexattr(request.nodeid, request.name(), request.caller())
        self._send(fuse.error_reply(request.unique, 0))
