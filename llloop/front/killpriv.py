"""Clearing of set-ID bits and capabilities when a file changes, as the source's kernel would do it (fs/attr.c).

Writes, allocations, truncations and changes of the owner clear them. The kernel requests that in three ways:

* A flag of SETATTR, OPEN or WRITE means that the caller lacks CAP_FSETID. The source clears the bits with the change.
* If the cached mode has such bits or the file has capabilities, the kernel sends a SETATTR without changes. It does so
  before writes and allocations, and for a chown(2) with neither owner nor group. It takes the mode from the reply. This
  is the only way to tell the kernel of the new mode before another process can execute the file.
* The kernel removes the attribute security.capability before each of these changes, without telling which one follows.
"""

from __future__ import annotations

import os
import stat
from contextlib import AbstractContextManager, nullcontext

from llloop.front.directory_fds import Reached
from llloop.front.open_files import Handle, Handles
from llloop.front.permissions import Permissions, not_permitted
from llloop.front.requester import Requester
from llloop.linux import fuse, syscalls
from llloop.linux.credentials import Caller, SetidGuard, is_mandatory_lock_mode
from llloop.linux.syscalls import Attributes, fstatx
from llloop.shared.leadership import Leadership

CAPABILITY = b"security.capability"

_AS_IT_IS = nullcontext()


def has_capability(target: int | str) -> bool:
    """Return whether a file (a descriptor or a path) has capabilities; False if this process may not know."""
    try:
        os.getxattr(target, CAPABILITY)
    except OSError:
        return False
    return True


class KillPriv:
    """Clears set-ID bits and capabilities of files.

    Args:
        setid: controls whether the source clears set-ID bits.
        caller: sets the caller's group.
        handles: the open files.
        permissions: checks what a requester may do.
        leadership: decides which thread serves.
        writeback: whether the kernel caches writes. Then FATTR_CTIME marks a SETATTR that is for a chown(2).
    """

    def __init__(
        self,
        setid: SetidGuard,
        caller: Caller,
        handles: Handles,
        permissions: Permissions,
        leadership: Leadership,
        *,
        writeback: bool,
    ) -> None:
        self._permissions = permissions
        self._leadership = leadership
        self._writeback = writeback
        self._setid = setid
        self._caller = caller
        self._handles = handles
        # The inode whose capability was removed last, and the requesting thread.
        self._stripped = (0, 0)

    def setid_cleared(self, fd: int, clear: bool, who: Requester) -> AbstractContextManager[None]:
        """Return a context in which the next call clears an open file's set-ID bits if *clear*, else keeps them.

        In mandatory lock mode, the kernel checks whether this process is in the file's group. So the context sets a
        group that matches the requester's membership.
        """
        self._setid.clear(clear)
        if clear:
            attributes = fstatx(fd)
            if is_mandatory_lock_mode(attributes.mode):
                gid = attributes.gid if self._permissions.is_member(who, attributes.gid) else who.gid
                return self._caller(who.uid, gid)
        return _AS_IT_IS

    def clear_privileges(self, reached: Reached, nodeid: int, valid: int, who: Requester) -> None:
        """Serve a SETATTR without changes: clear set-ID bits.

        If the file is not open for writing, the request can only be for a chown(2). If it is, the requester may neither
        own the file nor have opened it. Then the request is either for a chown(2), which must change nothing, or for a
        write through a descriptor that the requester was given. In that case this method does nothing: the write clears
        the bits itself, and the kernel is notified after it.

        Args:
            reached: a descriptor of the file.
            nodeid: its inode.
            valid: the FATTR_ bits of the request.
            who: the requester.

        Raises:
            OSError: EPERM, for a chown(2) of another user's file with set-ID bits or capabilities.
        """
        attributes = fstatx(reached.fd)
        if not stat.S_ISREG(attributes.mode):
            return
        bits = attributes.mode & stat.S_ISUID
        if attributes.mode & stat.S_ISGID and not (
            is_mandatory_lock_mode(attributes.mode)
            and (who.uid == 0 or self._permissions.is_member(who, attributes.gid))
        ):
            bits |= stat.S_ISGID
        writing = [] if valid & fuse.FATTR_CTIME else self._writing(nodeid)
        may_take = self._may_take(writing, attributes, who)
        if writing and self._writeback:
            # The written data can be executed from the page cache before it reaches the source.
            if not may_take and has_capability(reached.target):
                self._leadership.call(os.removexattr, reached.target, CAPABILITY)
        elif writing and not may_take:
            if any(handle.backing for handle in writing):  # the kernel would write with the opener's credentials
                raise not_permitted()
            _have_writes_clear(writing)
            return
        if writing:
            # Before a write by a process with CAP_FSETID, the kernel only sends this because of capabilities.
            if who.uid == 0 and self._stripped == (nodeid, who.pid):
                bits = 0
        elif (bits or has_capability(reached.target)) and not self._permissions.owns(who, attributes):
            raise not_permitted()
        self._stripped = (0, 0)
        if bits:
            self._setid.clear(False)
            chmod = syscalls.chmod if reached.is_path else os.fchmod
            try:
                self._leadership.call(chmod, reached.fd, stat.S_IMODE(attributes.mode) & ~bits)
            except PermissionError:  # this process may write to the file but not change its mode
                if not writing:
                    raise
                _have_writes_clear(writing)

    def _writing(self, nodeid: int) -> list[Handle]:
        return [handle for handle in self._handles.of_inode(nodeid) if handle.is_writable]

    def _may_take(self, writing: list[Handle], attributes: Attributes, who: Requester) -> bool:
        """Return whether the requester could clear privileges in the source: as owner, or by having opened the file."""
        return self._permissions.owns(who, attributes) or (
            who.uid != 0 and any(handle.opener[0] == who.uid for handle in writing)
        )

    def clears_capability(self, reached: Reached, nodeid: int, who: Requester) -> bool:
        """Return whether to remove a file's capabilities when the kernel asks for it.

        For other users than root, the owner and those who have opened the file for writing, the kernel asks either
        because of a truncation or write, which removes them itself, or because of a chown(2), which must not.
        """
        if not self._may_take(self._writing(nodeid), fstatx(reached.fd), who):
            return False
        self._stripped = (nodeid, who.pid)
        return True


def _have_writes_clear(writing: list[Handle]) -> None:
    """Make writes through these open files clear set-ID bits and notify the kernel."""
    for handle in writing:
        handle.uncached = True
