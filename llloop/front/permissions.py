"""Permission checks with the current attributes of the source, after the kernel's check with cached ones.

With default_permissions, the kernel checks a caller's permissions with the attributes in its cache. They may be as old
as their timeout, and even older for calls on a descriptor (fchmod(2), fsetxattr(2)). So a call that depends on a
permission is made with the caller's credentials, and the kernel checks it again in the source. Before an open file is
returned, the kernel is asked whether the caller may open it.

The user and group ids in a request mostly suffice. Supplementary groups and capabilities are only read if they can make
a difference, because that takes some microseconds.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import AbstractContextManager, nullcontext

from llloop.front.recovery.intents import NOWHERE
from llloop.front.requester import Requester
from llloop.linux import syscalls
from llloop.linux.credentials import FILE_CAPABILITIES, Caller
from llloop.linux.process_credentials import Callers, Credentials
from llloop.linux.syscalls import Attributes, fstatx

_FMODE_EXEC = 1 << 5  # <linux/fs.h>; the kernel adds it to the flags if it opens a file to execute it
# The permissions (4 read, 2 write, 1 execute) that an open needs, by its access mode.
_NEEDED = {os.O_RDONLY: 4, os.O_WRONLY: 2, os.O_RDWR: 6, os.O_ACCMODE: 6}
# The permissions that suffice for every change in a directory, and of another file.
_CHANGE_DIRECTORY, _CHANGE_FILE = 3, 6
# Root in a container seldom has this capability, and only needs it to set file flags.
_FOR_FLAGS = 1 << syscalls.CAP_LINUX_IMMUTABLE
_AS_IT_IS = nullcontext()
_ACL = "system.posix_acl_access"


class Permissions:
    """Acts with a requester's credentials, and checks what a requester may do.

    Args:
        caller: sets the credentials.
        root: a descriptor of the source.
        callers: tells the credentials of requesters.
        acl: whether files can have POSIX ACLs.
        suid: whether the mount has the option suid.
    """

    def __init__(self, caller: Caller, root: int, callers: Callers, *, acl: bool, suid: bool) -> None:
        self._caller = caller
        self._root = root
        self._callers = callers
        self._acl = acl
        self._suid = suid
        _, permitted, _ = syscalls.get_capabilities()
        self._all = permitted & FILE_CAPABILITIES & ~_FOR_FLAGS

    def is_trusted(self, who: Requester) -> bool:
        """Return whether to use this process's own credentials: the requester has the same, or they cannot change."""
        if not self._caller.can_switch:
            return True
        if who.uid:
            return False
        if self._callers.are_mapped:  # root of the source may be anybody; only the server itself has no thread
            return not who.pid and who.note is NOWHERE
        if not who.pid:
            return True
        try:
            effective, _, _ = syscalls.get_capabilities(who.pid)
        except OSError:  # the thread is not visible here
            return True
        # Root without all capabilities is still trusted if, for example, overlayfs acts as root for another thread.
        return effective & self._all == self._all or self._callers.credentials(who.pid, who.uid, who.gid) is None

    def acting(
        self, who: Requester, *fds: int, owned: tuple[Attributes, ...] = (), by_group: bool | None = None
    ) -> AbstractContextManager[None]:
        """Act with the requester's credentials in a ``with`` block that makes one system call.

        Args:
            who: the requester.
            fds: descriptors of the directories and files whose permissions or owners matter for the call.
            owned: the attributes of files that lose a name; in sticky directories their owners matter.
            by_group: whether the requester's supplementary groups matter: True if always, False if only owners matter,
                None if it depends on the permissions.
        """
        if self.is_trusted(who):
            return _AS_IT_IS
        files = [fstatx(fd) for fd in fds]
        # A capability counts for a file only if the requester's user namespace knows its owner and group. So those
        # files decide which capabilities there are for which one may be needed.
        needing = _protected(who, files, owned)
        if by_group is None and not self._callers.are_mapped:
            needing += [one for fd, one in zip(fds, files, strict=True) if not self._may_plainly_change(who, fd, one)]
            exactly = bool(needing)
        else:
            needing += files
            exactly = by_group is not False or any(attributes.uid != who.uid for attributes in files)
        return self._exactly_as(who, *needing) if exactly else self._caller(who.uid, who.gid, (), 0)

    # A mount that shows other attributes checks these by what it shows (`llloop.front.views`): changes of names, and of
    # modes and times.
    changing_names = changing_attributes = acting

    def setting_xattr(self, who: Requester, fd: int, name: bytes) -> AbstractContextManager[None]:
        """Act with the requester's credentials in a ``with`` block that sets or removes an extended attribute.

        If a user who is not a member of the file's group sets an access ACL, the set-group-ID bit is cleared. File
        capabilities need a capability, which root of a user namespace has for its own files.

        Args:
            who: the requester.
            fd: a descriptor of the file.
            name: the attribute's name with its namespace.
        """
        return self.acting(who, fd, by_group=None if name.startswith(b"user.") else True)

    def setting_file_attributes(self, who: Requester, fd: int) -> AbstractContextManager[None]:
        """Act with the requester's credentials in a ``with`` block that sets flags of a file (ioctl_iflags(2)).

        Args:
            who: the requester.
            fd: a descriptor of the file.
        """
        return self._exactly_as(who, fstatx(fd))

    def creating(self, who: Requester, directory: int, *, by_group: bool | None = None) -> AbstractContextManager[None]:
        """Act as `acting` does, for a call that creates an object, which then belongs to the requester."""
        self._caller.set_umask(who.umask)
        if self.is_trusted(who):
            return self._caller(who.uid, who.gid)
        return self.acting(who, directory, by_group=by_group)

    def may(self, who: Requester, needed: int, fd: int, attributes: Attributes) -> bool:
        """Return whether a file's permissions allow the requester an access.

        Args:
            who: the requester.
            needed: the access: 4 to read, 2 to write, 1 to execute or search, combined.
            fd: a descriptor of the file.
            attributes: its attributes.
        """
        if self._may_plainly(who, needed, fd, attributes) or self.is_trusted(who):
            return True
        with self._exactly_as(who, attributes):
            return syscalls.may_access(fd, needed)

    def check_open(self, who: Requester, flags: int, fd: int, attributes: Attributes) -> None:
        """Check that the requester may open a file.

        Args:
            who: the requester.
            flags: the open(2) flags.
            fd: a descriptor of the file.
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
            raise not_permitted()

    def _may_run_here(self, fd: int, attributes: Attributes) -> bool:
        """Return whether the mount flags of the program's file system below the source allow running it.

        The kernel only knows the flags of llloop's mount. A program cannot be run without its privileges for a single
        file. So if nosuid would remove a program's privileges, it is not run at all.
        """
        more = os.fstatvfs(fd).f_flag & ~os.fstatvfs(self._root).f_flag
        if more & os.ST_NOEXEC:
            return False
        return not (self._suid and more & os.ST_NOSUID and _has_privileges(fd, attributes))

    def owns(self, who: Requester, attributes: Attributes) -> bool:
        """Return whether the requester is a file's owner or has CAP_FOWNER."""
        if who.uid == attributes.uid or self.is_trusted(who):
            return True
        return bool(self._capabilities(self._credentials(who), attributes) >> syscalls.CAP_FOWNER & 1)

    # Whether a new file with these attributes can be the requester's.
    may_have_created = owns

    def is_member(self, who: Requester, gid: int) -> bool:
        """Return whether the requester is a member of a group."""
        return who.gid == gid or gid in self._credentials(who).groups

    def may_see_trusted(self, who: Requester) -> bool:
        """Return whether the requester may see attributes called trusted.* (xattr(7))."""
        if not self._callers.are_mapped:
            return who.uid == 0
        return self._callers.is_administrator(who.pid)

    def _may_plainly(self, who: Requester, needed: int, fd: int, attributes: Attributes) -> bool:
        """Return whether a file's permissions allow an access regardless of supplementary groups and capabilities."""
        mode = attributes.mode
        if who.uid == attributes.uid:
            return mode >> 6 & needed == needed
        return mode >> 3 & mode & needed == needed and not (self._acl and _has_acl(fd))

    def _may_plainly_change(self, who: Requester, fd: int, attributes: Attributes) -> bool:
        needed = _CHANGE_DIRECTORY if stat.S_ISDIR(attributes.mode) else _CHANGE_FILE
        return self._may_plainly(who, needed, fd, attributes)

    def _credentials(self, who: Requester) -> Credentials:
        return self._callers.credentials(who.pid, who.uid, who.gid) or Credentials((), 0, who.pid)

    def _exactly_as(self, who: Requester, *files: Attributes) -> Caller:
        """Return a context with the requester's groups, and those of its capabilities that apply to all *files*."""
        credentials = self._credentials(who)
        capabilities = FILE_CAPABILITIES
        for attributes in files:
            capabilities &= self._capabilities(credentials, attributes)
        return self._caller(who.uid, who.gid, credentials.groups, capabilities)

    def _capabilities(self, credentials: Credentials, attributes: Attributes) -> int:
        """Return the capabilities that apply to a file."""
        capabilities = credentials.capabilities & FILE_CAPABILITIES
        if capabilities and self._callers.are_capable(credentials.pid, attributes.uid, attributes.gid):
            return capabilities
        return 0


def _protected(who: Requester, directories: list[Attributes], owned: tuple[Attributes, ...]) -> list[Attributes]:
    """Return the files that a sticky directory protects from who is not their owner (inode(7))."""
    if not any(one.mode & stat.S_ISVTX and one.uid != who.uid for one in directories):
        return []
    return [one for one in owned if one.uid != who.uid]


def _has_privileges(fd: int, attributes: Attributes) -> bool:
    """Return whether a program runs with other privileges than those of its user."""
    if attributes.mode & (stat.S_ISUID | stat.S_ISGID):
        return True
    try:
        os.getxattr(fd, "security.capability")
    except OSError:
        return False
    return True


def denied() -> OSError:
    """Return the error EACCES."""
    return OSError(errno.EACCES, os.strerror(errno.EACCES))


def not_permitted() -> OSError:
    """Return the error EPERM."""
    return OSError(errno.EPERM, os.strerror(errno.EPERM))


def _has_acl(fd: int) -> bool:
    """Return whether a file has a POSIX ACL; True if this process may not know."""
    try:
        os.getxattr(f"/proc/self/fd/{fd}", _ACL)
    except OSError as error:
        return error.errno not in (errno.ENODATA, errno.EOPNOTSUPP)
    return True
