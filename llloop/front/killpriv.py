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

from llloop.front.directory_fds import Reached
from llloop.front.open_files import Handle, Handles
from llloop.front.permissions import Permissions
from llloop.front.requester import Requester
from llloop.linux import fuse, syscalls
from llloop.linux.credentials import Caller, SetidGuard, is_mandatory_lock_mode
from llloop.linux.process_credentials import credentials_of
from llloop.linux.syscalls import Attributes, fstatx
from llloop.shared.leadership import Leadership

CAPABILITY = b"security.capability"

_AS_IT_IS = nullcontext()


def has_capability(target: int | str) -> bool:
    """Whether a file, named by a descriptor or a path, has capabilities, as far as one may know."""
    try:
        os.getxattr(target, CAPABILITY)
    except OSError:
        return False
    return True


class KillPriv:
    """Takes from files what a change takes from them.

    Args:
        setid: has the source clear set-ID bits.
        caller: acts with another group.
        handles: the open files.
        rights: tells what a requester may do.
        leadership: which thread serves.
        writeback: whether the kernel collects writes, and says by FATTR_CTIME that it means a chown(2).
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
        # Of which inode a capability was removed last, and for which process.
        self._stripped = (0, 0)

    def clearing(self, fd: int, clear: bool, who: Requester) -> AbstractContextManager[None]:
        """Have the source clear the set-ID bits of an open file with the next call, or keep them.

        The source asks whether this process is in the file's group, where that is for the caller to be.
        """
        self._setid.clear(clear)
        if clear:
            attributes = fstatx(fd)
            if is_mandatory_lock_mode(attributes.mode):
                gid = attributes.gid if _is_member(who, attributes.gid) else who.gid
                return self._caller(who.uid, gid)
        return _AS_IT_IS

    def give_up(self, reached: Reached, nodeid: int, valid: int, who: Requester) -> None:
        """Do what the kernel means by a SETATTR that sets nothing.

        If nobody has the file open for writing, it can only be for a chown(2). If somebody has, who neither owns the
        file nor has opened it may mean a chown(2), which must not change it, or write through a descriptor that he was
        given. Then nothing is done here: a write clears the bits itself, and the kernel is told after it.

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
            is_mandatory_lock_mode(attributes.mode) and (who.uid == 0 or _is_member(who, attributes.gid))
        ):
            bits |= stat.S_ISGID
        writing = [] if valid & fuse.FATTR_CTIME else self._writing(nodeid)
        may_take = self._may_take(writing, attributes, who)
        if writing and self._writeback:
            # What is to be written can be executed from the page cache before it is written to the source.
            if not may_take and has_capability(reached.target):
                self._leadership.call(os.removexattr, reached.target, CAPABILITY)
        elif writing and not may_take:
            if any(handle.backing for handle in writing):  # the kernel would write as who has opened the file
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            _have_writes_clear(writing)
            return
        if writing:
            # Before it writes for who has CAP_FSETID, the kernel sends it only because of capabilities.
            if who.uid == 0 and self._stripped == (nodeid, who.pid):
                bits = 0
        elif (bits or has_capability(reached.target)) and not self._permissions.owns(who, attributes):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        self._stripped = (0, 0)
        if bits:
            self._setid.clear(False)
            chmod = syscalls.chmod if reached.is_path else os.fchmod
            try:
                self._leadership.call(chmod, reached.fd, stat.S_IMODE(attributes.mode) & ~bits)
            except PermissionError:  # this process may only write to the file
                if not writing:
                    raise
                _have_writes_clear(writing)

    def _writing(self, nodeid: int) -> list[Handle]:
        return [handle for handle in self._handles.of_inode(nodeid) if handle.is_writable]

    def _may_take(self, writing: list[Handle], attributes: Attributes, who: Requester) -> bool:
        """Whether the requester could take privileges from a file natively, which he has perhaps opened for writing."""
        return self._permissions.owns(who, attributes) or (
            who.uid != 0 and any(handle.opener[0] == who.uid for handle in writing)
        )

    def takes_capability(self, reached: Reached, nodeid: int, who: Requester) -> bool:
        """Whether the capabilities of a file go because the kernel asks to remove them.

        It asks for somebody else than root, the owner and who has the file open for writing only because of a
        truncation or a write, with which they go, or because of a chown(2), which is refused next or takes nothing.
        """
        if not self._may_take(self._writing(nodeid), fstatx(reached.fd), who):
            return False
        self._stripped = (nodeid, who.pid)
        return True


def _have_writes_clear(writing: list[Handle]) -> None:
    """Have writes through open files clear set-ID bits, and the kernel told then."""
    for handle in writing:
        handle.uncached = True


def _is_member(who: Requester, gid: int) -> bool:
    if who.gid == gid:
        return True
    credentials = credentials_of(who.pid, who.uid, who.gid)
    return credentials is not None and gid in credentials.groups
