"""Extended attributes, as they are read.

The kernel asks for ``security.capability`` when a file is written for the first time or gets another owner, and for the
access ACL whenever `ls -l` lists it; mostly there is neither.
"""

from __future__ import annotations

import errno
import os

from llloop.front.handlers.base import Responder
from llloop.front.request import FuseRequest
from llloop.linux import fuse


class XattrRequests(Responder):
    """The handlers; see `Responder`."""

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
        """Reply with *value*, or, if no room is offered for one, with its length."""
        if not size:
            value = fuse.GETXATTR_OUT.pack(len(value))
        elif len(value) > size:
            raise OSError(errno.ERANGE, os.strerror(errno.ERANGE))
        self._send(fuse.reply(unique, value))
