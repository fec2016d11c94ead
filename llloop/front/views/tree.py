"""A file tree that ignores or refuses changes of owners and modes (`--chown`, `--chmod`)."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from llloop.config import Policy
from llloop.front.requester import Requester
from llloop.front.tree import CHANGES, Changes, Tree
from llloop.linux import fuse
from llloop.linux.credentials import SETID_BITS
from llloop.linux.syscalls import Attributes

_OWNER = fuse.FATTR_UID | fuse.FATTR_GID
# Setting this attribute also sets the mode.
_ACL = b"system.posix_acl_access"


class PolicyTree(Tree):
    """See `Tree`.

    Args:
        chown: what to do when a program changes owner or group of a file.
        chmod: what to do when a program changes the mode or the access ACL of a file.
    """

    def __init__(self, *arguments: Any, chown: Policy, chmod: Policy, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._chown = chown
        self._chmod = chmod

    def setattr(self, nodeid: int, changes: Changes, handle: int | None, who: Requester) -> Attributes:
        """See `Tree.setattr`."""
        valid = changes.valid
        if valid & _OWNER and not self._is_allowed(self._chown):
            valid &= ~_OWNER
        if valid & fuse.FATTR_MODE and not (self._clears_only(nodeid, changes) or self._is_allowed(self._chmod)):
            valid &= ~fuse.FATTR_MODE
        if valid != changes.valid and not valid & CHANGES:  # a SETATTR without changes would clear set-ID bits
            return self.getattr(nodeid)
        return super().setattr(nodeid, changes._replace(valid=valid), handle, who)

    def _clears_only(self, nodeid: int, changes: Changes) -> bool:
        """Return whether the kernel clears set-ID bits before a write (Linux < 5.12)."""
        if not self._clears_setid:
            return False
        current = stat.S_IMODE(self.getattr(nodeid).mode)
        mode = stat.S_IMODE(changes.mode)
        return mode != current and mode | current & SETID_BITS == current

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int, who: Requester, *, kill_sgid: bool) -> None:
        """See `Tree.setxattr`."""
        if name != _ACL or self._is_allowed(self._chmod):
            super().setxattr(nodeid, name, value, flags, who, kill_sgid=kill_sgid)

    def removexattr(self, nodeid: int, name: bytes, who: Requester) -> None:
        """See `Tree.removexattr`."""
        if name != _ACL or self._is_allowed(self._chmod):
            super().removexattr(nodeid, name, who)

    @staticmethod
    def _is_allowed(policy: Policy) -> bool:
        """Return whether to make a change; False to ignore it.

        Raises:
            OSError: EPERM if it is denied.
        """
        if policy is Policy.DENY:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return policy is Policy.REAL
