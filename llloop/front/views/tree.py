"""File trees of views: changes of owners and modes are ignored or refused, attributes are shown otherwise."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from llloop.config import Policy
from llloop.front.directory_fds import Reached
from llloop.front.open_files import Handle
from llloop.front.permissions import not_permitted
from llloop.front.requester import Requester
from llloop.front.tree import CHANGES, Changes, Tree
from llloop.front.views.new_files import NewModes
from llloop.front.views.permissions import ShownPermissions
from llloop.front.views.shown import Shown
from llloop.linux import fuse
from llloop.linux.credentials import SETID_BITS
from llloop.linux.syscalls import Attributes, fstatx

_OWNER = fuse.FATTR_UID | fuse.FATTR_GID
# Setting this attribute also sets the mode.
_ACL = b"system.posix_acl_access"
_ACLS = b"system.posix_acl_"


class ViewTree(Tree):
    """See `Tree`.

    Args:
        chown: what to do when a program changes owner or group of a file.
        chmod: what to do when a program changes the mode or the access ACL of a file.
        modes: decides the modes of new files.
    """

    def __init__(self, *arguments: Any, chown: Policy, chmod: Policy, modes: NewModes, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._chown = chown
        self._chmod = chmod
        self._modes = modes

    def mknod(self, parent: int, name: bytes, mode: int, device: int, who: Requester) -> tuple[int, Attributes]:
        """See `Tree.mknod`."""
        mode, who = self._modes.of(mode, who)
        return super().mknod(parent, name, mode, device, who)

    def mkdir(self, parent: int, name: bytes, mode: int, who: Requester) -> tuple[int, Attributes]:
        """See `Tree.mkdir`."""
        mode, who = self._modes.of(mode | stat.S_IFDIR, who)
        return super().mkdir(parent, name, mode, who)

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
            raise not_permitted()
        return policy is Policy.REAL


class ShownTree(ViewTree):
    """See `ViewTree`. The mount shows other attributes than the source, and no ACLs.

    Args:
        shown: converts attributes.
    """

    permissions: ShownPermissions

    def __init__(self, *arguments: Any, shown: Shown, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._shown = shown

    def _change_owner(self, fd: int, uid: int, gid: int, who: Requester) -> None:
        attributes = fstatx(fd)
        if not self.permissions.is_trusted(who):
            shown = self._shown.of(attributes)
            uid = -1 if uid == shown.uid else uid
            gid = -1 if gid == shown.gid else gid
            if uid == gid == -1:  # it is shown like that already
                return
            if not self.permissions.owns_in_source(who, attributes):
                raise not_permitted()
        super()._change_owner(fd, uid, gid, who)

    def _change_mode(self, reached: Reached, mode: int, who: Requester) -> None:
        attributes = fstatx(reached.fd)
        if not self.permissions.owns_in_source(who, attributes):
            kept = attributes.mode & SETID_BITS if stat.S_ISDIR(attributes.mode) else 0
            mode = mode & ~SETID_BITS | mode & kept
        super()._change_mode(reached, mode, who)

    def statx_raw(self, nodeid: int, mask: int, flags: int, handle: Handle | None = None) -> bytearray:
        """See `Tree.statx_raw`."""
        raw = super().statx_raw(nodeid, mask, flags, handle)
        self._shown.convert(memoryview(raw), 1)
        return raw

    def getxattr(self, nodeid: int, name: bytes, who: Requester) -> bytes:
        """See `Tree.getxattr`."""
        _refuse_acl(name)
        return super().getxattr(nodeid, name, who)

    def listxattr(self, nodeid: int, who: Requester) -> list[bytes]:
        """See `Tree.listxattr`."""
        return [name for name in super().listxattr(nodeid, who) if not name.startswith(_ACLS)]

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int, who: Requester, *, kill_sgid: bool) -> None:
        """See `Tree.setxattr`."""
        _refuse_acl(name)
        super().setxattr(nodeid, name, value, flags, who, kill_sgid=kill_sgid)

    def removexattr(self, nodeid: int, name: bytes, who: Requester) -> None:
        """See `Tree.removexattr`."""
        _refuse_acl(name)
        super().removexattr(nodeid, name, who)


def _refuse_acl(name: bytes) -> None:
    if name.startswith(_ACLS):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
