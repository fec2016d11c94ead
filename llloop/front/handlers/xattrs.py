"""GETXATTR and LISTXATTR.

The kernel requests ``security.capability`` when a file is first written or gets another owner, and the access ACL
whenever `ls -l` lists a file. Most files have neither.
"""

from __future__ import annotations

import errno
import os

from llloop.front.handlers.base import Responder
from llloop.front.request import FuseRequest
from llloop.linux import fuse


class XattrRequests(Responder):
    """The handlers, see `Responder`."""

    def getxattr(self, request: FuseRequest) -> None:
        """FUSE_GETXATTR."""
        (size,) = fuse.GETXATTR_REQUEST.unpack_from(self._memory, request.base)
        self._check_xattr()
        name = request.string(fuse.GETXATTR_REQUEST.size)
        self._reply_value(request.unique, size, self._tree.getxattr(request.nodeid, name, request.caller()))

    def listxattr(self, request: FuseRequest) -> None:
        """FUSE_LISTXATTR."""
        (size,) = fuse.GETXATTR_REQUEST.unpack_from(self._memory, request.base)
        self._check_xattr()
        names = self._tree.listxattr(request.nodeid, request.caller())
        self._reply_value(request.unique, size, b"".join(name + b"\0" for name in names))

    def _reply_value(self, unique: int, size: int, value: bytes) -> None:
        """Reply with *value*, or with its length if *size*, the size of the caller's buffer, is 0."""
        if not size:
            value = fuse.GETXATTR_OUT.pack(len(value))
        elif len(value) > size:
            raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
        self._send(fuse.reply(unique, value))
