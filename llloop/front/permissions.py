"""Who may do what: the check that the source makes again, after the kernel has made it.

With default_permissions the kernel checks each caller's rights by the attributes that it keeps of an inode. They may
be as old as their timeout, and for what is done through a descriptor (fchmod(2), fsetxattr(2)) older. So whatever
depends on a right is done as the caller, and the kernel checks it again by what the source says at that moment; or,
where a descriptor is to be handed out, it is asked whether the caller may have it.

What a request says of its caller mostly suffices. Supplementary groups and capabilities are looked up only where they
can make a difference: that costs some microseconds.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat

from llloop.front.requester import Requester
from llloop.linux import syscalls
from llloop.linux.credentials import FILE_CAPABILITIES, Caller
from llloop.linux.process_credentials import Credentials, credentials_of
from llloop.linux.syscalls import Attributes, fstatx

_FMODE_EXEC = 1 << 5  # <linux/fs.h>; what the kernel adds to the open(2) flags of a file that is to be executed
# What permissions (4 read, 2 write, 1 execute) an open needs, by its access mode.
_NEEDED = {os.O_RDONLY: 4, os.O_WRONLY: 2, os.O_RDWR: 6, os.O_ACCMODE: 6}
# What is asked of directories and of other files for a change that depends on their permissions.
_CHANGE_DIRECTORY, _CHANGE_FILE = 3, 6
# Root of a container seldom has this capability, and needs it only to set flags.
_FOR_FLAGS = 1 << syscalls.CAP_LINUX_IMMUTABLE
_AS_IT_IS = nullcontext()
_ACL = "system.posix_acl_access"


class Permissions:
    """Acts as the requester, and tells what a requester may do.

    Args:
        caller: acts as others.
        root: a descriptor of the source.
        acl: whether files can have POSIX ACLs.
        suid: whether set-ID programs of this mount get their privileges.
    """

    def __init__(self, caller: Caller, root: int, *, acl: bool, suid: bool) -> None:
        self._caller = caller
        self._root = root
        self._acl = acl
        self._suid = suid
        _, permitted, _ = syscalls.get_capabilities()
        self._all = permitted & FILE_CAPABILITIES & ~_FOR_FLAGS

    def is_trusted(self, who: Requester) -> bool:
        """Whether this process's own rights are the requester's as well, or it cannot act with any others."""
        if not self._caller.can_switch:
            return True
        if who.uid:
            return False
        if not who.pid:
            return True
        try:
            effective, _, _ = syscalls.get_capabilities(who.pid)
        except OSError:  # the thread is not known here
            return True
        # Without all of them root is root still if it is overlayfs, for example, that acts as root for others.
        return effective & self._all == self._all or credentials_of(who.pid, who.uid, who.gid) is None

    def acting(
        self, who: Requester, *fds: int, owned: tuple[Attributes, ...] = (), by_group: bool | None = None
    ) -> AbstractContextManager[None]:
        """Act as the requester until the ``with`` block ends, in which one system call is made.

        Args:
            who: the requester.
            fds: descriptors of the directories and files on whose permissions or owners it depends.
            owned: the attributes of the files that lose a name, on whose owners it depends in sticky directories.
            by_group: whether it depends on the requester's supplementary groups: True if it does in any case, False if
                only owners count, None if the permissions tell.
        """
        if self.is_trusted(who):
            return _AS_IT_IS
        files = [fstatx(fd) for fd in fds]
        if by_group is None:
            exactly = not all(map(self._may_plainly_change, repeat(who), fds, files)) or _is_protected(
                who, files, owned
            )
        else:
            exactly = by_group or any(attributes.uid != who.uid for attributes in files)
        return self._exactly_as(who, *files, *owned) if exactly else self._caller(who.uid, who.gid, (), 0)

    def setting_file_attributes(self, who: Requester, fd: int) -> AbstractContextManager[None]:
        """Act as the requester until the ``with`` block ends, in which flags of a file are set (ioctl_iflags(2)).

        Args:
            who: the requester.
            fd: a descriptor of the file.
        """
        return self._exactly_as(who, fstatx(fd))

    def making(self, who: Requester, directory: int, *, by_group: bool | None = None) -> AbstractContextManager[None]:
        """Make something that belongs to the requester; for the arguments see `acting`."""
        self._caller.set_umask(who.umask)
        if self.is_trusted(who):
            return self._caller(who.uid, who.gid)
        return self.acting(who, directory, by_group=by_group)

    def may(self, who: Requester, needed: int, fd: int, attributes: Attributes) -> bool:
        """Whether a file's permissions allow the requester something.

        Args:
            who: the requester.
            needed: what it is: 4 to read, 2 to write, 1 to execute or search, combined.
            fd: a descriptor of the file.
            attributes: its attributes.
        """
        if self._may_plainly(who, needed, fd, attributes) or self.is_trusted(who):
            return True
        with self._exactly_as(who, attributes):
            return syscalls.may_access(fd, needed)

    def check_open(self, who: Requester, flags: int, fd: int, attributes: Attributes) -> None:
        """Refuse a descriptor that the requester must not get.

        Args:
            who: the requester.
            flags: its open(2) flags.
            fd: the descriptor.
            attributes: the file's attributes.

        Raises:
            OSError: EACCES, or EPERM for O_NOATIME.
        """
        needed = 1 if flags & _FMODE_EXEC else _NEEDED[flags & os.O_ACCMODE]
        if flags & os.O_TRUNC:
            needed |= 2
        if not self.may(who, needed, fd, attributes):
            raise denied()
        if flags & _FMODE_EXEC and not self._may_run_here(fd, attributes):
            raise denied()
        if flags & os.O_NOATIME and not self.owns(who, attributes):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def _may_run_here(self, fd: int, attributes: Attributes) -> bool:
        """Whether the mount below the source that holds a program lets it run, as this mount would run it.

        The kernel knows the flags of this mount only, which stand for those of the source's own mount. That a program
        runs without its privileges cannot be had for single files, so one that has some is not run where it would be.
        """
        more = os.fstatvfs(fd).f_flag & ~os.fstatvfs(self._root).f_flag
        if more & os.ST_NOEXEC:
            return False
        return not (self._suid and more & os.ST_NOSUID and _has_privileges(fd, attributes))

    def owns(self, who: Requester, attributes: Attributes) -> bool:
        """Whether the requester is a file's owner, or may do what the owner may."""
        if who.uid == attributes.uid or self.is_trusted(who):
            return True
        return bool(self._capabilities(self._credentials(who), attributes) >> syscalls.CAP_FOWNER & 1)

    def _may_plainly(self, who: Requester, needed: int, fd: int, attributes: Attributes) -> bool:
        """Whether a file's permissions allow something whatever the requester's groups and capabilities are."""
        mode = attributes.mode
        if who.uid == attributes.uid:
            return mode >> 6 & needed == needed
        return mode >> 3 & mode & needed == needed and not (self._acl and _has_acl(fd))

    def _may_plainly_change(self, who: Requester, fd: int, attributes: Attributes) -> bool:
        needed = _CHANGE_DIRECTORY if stat.S_ISDIR(attributes.mode) else _CHANGE_FILE
        return self._may_plainly(who, needed, fd, attributes)

    def _credentials(self, who: Requester) -> Credentials:
        return credentials_of(who.pid, who.uid, who.gid) or Credentials((), 0, who.pid)

    def _exactly_as(self, who: Requester, *files: Attributes) -> Caller:
        """Return a context in which this process has the requester's rights on some files."""
        credentials = self._credentials(who)
        capabilities = FILE_CAPABILITIES
        for attributes in files:
            capabilities &= self._capabilities(credentials, attributes)
        return self._caller(who.uid, who.gid, credentials.groups, capabilities)

    @staticmethod
    def _capabilities(credentials: Credentials, attributes: Attributes) -> int:
        """Return the capabilities that count for a file."""
        capabilities = credentials.capabilities & FILE_CAPABILITIES
        return capabilities if capabilities and credentials.covers(attributes.uid, attributes.gid) else 0


def _is_protected(who: Requester, directories: list[Attributes], owned: tuple[Attributes, ...]) -> bool:
    """Whether a sticky directory protects files from who is not their owner (inode(7))."""
    return any(one.mode & stat.S_ISVTX and one.uid != who.uid for one in directories) and any(
        one.uid != who.uid for one in owned
    )


def _has_privileges(fd: int, attributes: Attributes) -> bool:
    """Whether a program runs with other rights than those of who runs it."""
    if attributes.mode & (stat.S_ISUID | stat.S_ISGID):
        return True
    try:
        os.getxattr(fd, "security.capability")
    except OSError:
        return False
    return True


def denied() -> OSError:
    """Return the error for what a file's permissions do not allow."""
    return OSError(errno.EACCES, os.strerror(errno.EACCES))


def _has_acl(fd: int) -> bool:
    """Whether a file has a POSIX ACL, as far as one may know."""
    try:
        os.getxattr(f"/proc/self/fd/{fd}", _ACL)
    except OSError as error:
        return error.errno not in (errno.ENODATA, errno.EOPNOTSUPP)
    return True
