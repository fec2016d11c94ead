"""Which set-ID bits and capabilities a change takes from a file: those that it would take natively (fs/attr.c).

A write, an allocation, a truncation and a change of the owner take them. The kernel asks for it in three ways:

* A flag of SETATTR, OPEN or WRITE says that the caller has no CAP_FSETID. The source clears the bits with the change.
* Before it writes or allocates, and for a chown(2) that names neither owner nor group, the kernel sends a SETATTR that
  sets nothing, if the mode that it has cached has bits to lose or the file has capabilities. It takes the mode from the
  reply. So this is the only way by which it hears of the change before anybody can execute the file.
* It removes the attribute security.capability before each of these changes, without saying for which.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import AbstractContextManager, nullcontext

from .. import syscalls, wire
from ..credentials import credentials_of
from ..leadership import Leadership
from ..privilege import Caller, SetidGuard, has_locking_mark
from ..syscalls import fstatx
from .anchors import Reached
from .handles import Handles
from .requester import Requester

CAPABILITY = b"security.capability"

_AS_IT_IS = nullcontext()


def has_capability(target: int | str) -> bool:
    """Whether a file, named by a descriptor or a path, has capabilities, as far as one may know."""
    try:
        os.getxattr(target, CAPABILITY)
    except OSError:
        return False
    return True


class Privileges:
    """Takes from files what a change takes from them.

    Args:
        setid: has the source clear set-ID bits.
        caller: acts with another group.
        handles: the open files.
        leadership: which thread serves.
    """

    def __init__(self, setid: SetidGuard, caller: Caller, handles: Handles, leadership: Leadership) -> None:
        self._leadership = leadership
        self._setid = setid
        self._caller = caller
        self._handles = handles
        # Of which inode a capability was removed last, and for which process.
        self._stripped = (0, 0)

    def clearing(self, fd: int, clear: bool, who: Requester) -> AbstractContextManager[None]:
        """Have the source clear the set-ID bits of an open file with the next call, or keep them.

        The source asks whether this process is in the file's group, where that is for the caller to be.
        """
        self._setid.clear(clear)
        if clear:
            attributes = fstatx(fd)
            if has_locking_mark(attributes.mode):
                gid = attributes.gid if _is_member(who, attributes.gid) else who.gid
                return self._caller(who.uid, gid)
        return _AS_IT_IS

    def give_up(self, reached: Reached, nodeid: int, valid: int, who: Requester) -> None:
        """Do what the kernel means by a SETATTR that sets nothing.

        If nobody has the file open for writing, it can only be for a chown(2).

        Args:
            reached: a way to act on the file.
            nodeid: its inode.
            valid: the FATTR_ bits of the request.
            who: for whom the kernel sends it.

        Raises:
            OSError: EPERM, for a chown(2) of another user's file that has something to lose.
        """
        attributes = fstatx(reached.fd)
        if not stat.S_ISREG(attributes.mode):
            return
        bits = attributes.mode & stat.S_ISUID
        if attributes.mode & stat.S_ISGID and not (
            has_locking_mark(attributes.mode) and (who.uid == 0 or _is_member(who, attributes.gid))
        ):
            bits |= stat.S_ISGID
        is_write = self._is_write(nodeid, valid)
        if is_write:
            # Before it writes for who has CAP_FSETID, the kernel sends it only because of capabilities.
            if who.uid == 0 and self._stripped == (nodeid, who.pid):
                bits = 0
        elif who.uid not in (0, attributes.uid) and (bits or has_capability(reached.target)):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        self._stripped = (0, 0)
        if bits:
            self._setid.clear(False)
            chmod = syscalls.chmod if reached.is_path else os.fchmod
            try:
                self._leadership.call(chmod, reached.fd, stat.S_IMODE(attributes.mode) & ~bits)
            except PermissionError:  # this process may only write to the file
                if not is_write:
                    raise
                for handle in self._handles.of_inode(nodeid):
                    handle.uncached = True  # so the write clears the bits, and the kernel is told then

    def _is_write(self, nodeid: int, valid: int = 0) -> bool:
        """Whether the kernel may be about to write to a file; with FATTR_CTIME a change of the owner is meant."""
        return not valid & wire.FATTR_CTIME and any(handle.is_writable for handle in self._handles.of_inode(nodeid))

    def takes_capability(self, reached: Reached, nodeid: int, who: Requester) -> bool:
        """Whether the capabilities of a file go because the kernel asks to remove them.

        It asks for somebody else than root and the owner, if nobody has the file open for writing, only because of a
        truncation, with which they go, or because of a chown(2), which is refused next.
        """
        if not self._is_write(nodeid) and who.uid not in (0, fstatx(reached.fd).uid):
            return False
        self._stripped = (nodeid, who.pid)
        return True


def _is_member(who: Requester, gid: int) -> bool:
    if who.gid == gid:
        return True
    credentials = credentials_of(who.pid, who.uid, who.gid)
    return credentials is not None and gid in credentials.groups
