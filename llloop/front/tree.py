"""The file tree: each request on names and attributes as system calls on the source.

This module knows no FUSE structs and no llfuse types; the handlers translate. Errors are `OSError` with the source's
errno.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, Protocol, TypeVar

from llloop.front.directory_fds import DirectoryFds, Reached
from llloop.front.inodes import Inodes, stale
from llloop.front.killpriv import CAPABILITY, KillPriv
from llloop.front.open_files import Handle, Handles
from llloop.front.permissions import Permissions, denied
from llloop.front.requester import Requester
from llloop.linux import fuse, syscalls
from llloop.linux.credentials import SETID_BITS, SetidGuard
from llloop.linux.syscalls import Attributes, fstatx, statx, statx_or_none
from llloop.shared.leadership import Leadership

_PIN = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_TO_TRUNCATE = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
_NO_NAMES = frozenset({b"", b".", b".."})
_TIMES = fuse.FATTR_ATIME | fuse.FATTR_ATIME_NOW | fuse.FATTR_MTIME | fuse.FATTR_MTIME_NOW
CHANGES = fuse.FATTR_MODE | fuse.FATTR_UID | fuse.FATTR_GID | fuse.FATTR_SIZE | _TIMES


# The longest time that the kernel caches written data, in seconds (more than twice vm.dirty_expire_centisecs).
_MAX_CACHED_TIME = 100

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_Result = TypeVar("_Result")


class _Remove(Protocol):
    """os.unlink or os.rmdir."""

    def __call__(self, path: bytes, /, *, dir_fd: int) -> None: ...


def check_name(name: bytes) -> bytes:
    """Return *name*, after checking that it is a single component that stays in its directory.

    The kernel never sends another one, but security must not depend on that.

    Raises:
        OSError: EINVAL.
    """
    if name in _NO_NAMES or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return name


class Changes(NamedTuple):
    """The changes in a SETATTR request.

    Attributes:
        valid: the FATTR_ bits of the fields that are set.
        mode, uid, gid, size: the new values.
        atime, mtime, ctime: seconds and nanoseconds.
    """

    valid: int
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    atime: tuple[int, int] = (0, 0)
    mtime: tuple[int, int] = (0, 0)
    ctime: tuple[int, int] = (0, 0)


class Tree:
    """The namespace and the attributes of the source.

    Args:
        root: an O_PATH descriptor of the source directory.
        inodes: the inode table.
        directory_fds: gives access to inodes.
        handles: the open files, through which an inode can be reached whose name was removed in the source.
        permissions: acts with the requester's credentials.
        setid: controls whether set-ID bits are cleared.
        killpriv: clears set-ID bits and capabilities.
        leadership: decides which thread serves. Every change goes through its `call`, because a frozen file system
            blocks it. Data that was read before a call may be out of date after it, including descriptors that do not
            belong to the request.
        clears_setid: whether the kernel clears set-ID bits at a write itself, with SETATTR (Linux < 5.12).
    """

    def __init__(
        self,
        root: int,
        inodes: Inodes,
        directory_fds: DirectoryFds,
        handles: Handles,
        permissions: Permissions,
        setid: SetidGuard,
        killpriv: KillPriv,
        leadership: Leadership,
        *,
        clears_setid: bool,
    ) -> None:
        self._leadership = leadership
        self._call = leadership.call
        self._root = root
        self.inodes = inodes
        self.directory_fds = directory_fds
        self._handles = handles
        self.permissions = permissions
        self._setid = setid
        self._killpriv = killpriv
        self._clears_setid = clears_setid
        # Called with nodeid and number (st_ino) of an inode that the kernel does not know any more.
        self.on_forgotten: Callable[[int, int], None] | None = None

    # Names

    def lookup(self, parent: int, name: bytes) -> tuple[int, Attributes]:
        """Return nodeid and attributes of *name* in *parent*.

        Raises:
            OSError: ENOENT, or another error of statx(2).
        """
        found = self.find(parent, name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return found

    def find(self, parent: int, name: bytes) -> tuple[int, Attributes] | None:
        """Return nodeid and attributes of *name* in *parent*, or None if there is no such name."""
        attributes = statx_or_none(self.directory_fds.directory(parent), check_name(name))
        return None if attributes is None else (self.inodes.remember(parent, name, attributes), attributes)

    def forget(self, nodeid: int, lookups: int) -> None:
        """Subtract *lookups* from an inode's lookup count, and drop the inode at 0."""
        number = self.inodes.get(nodeid).number if self.on_forgotten is not None and nodeid in self.inodes else 0
        if self.inodes.forget(nodeid, lookups):
            self.directory_fds.drop(nodeid)
            if self.on_forgotten is not None:
                self.on_forgotten(nodeid, number)

    def mknod(self, parent: int, name: bytes, mode: int, device: int, who: Requester) -> tuple[int, Attributes]:
        """Create a file, FIFO, socket or device (mknod(2)); *device* is the result of makedev(3)."""
        return self._create(parent, name, who, lambda at: self._call(os.mknod, name, mode, device, dir_fd=at), mode)

    def mkdir(self, parent: int, name: bytes, mode: int, who: Requester) -> tuple[int, Attributes]:
        """Create a directory (mkdir(2))."""
        return self._create(parent, name, who, lambda at: self._call(os.mkdir, name, stat.S_IMODE(mode), dir_fd=at))

    def symlink(self, parent: int, name: bytes, target: bytes, who: Requester) -> tuple[int, Attributes]:
        """Create a symlink (symlink(2))."""
        return self._create(parent, name, who, lambda at: self._call(os.symlink, target, name, dir_fd=at))

    def _create(
        self, parent: int, name: bytes, who: Requester, create: Callable[[int], None], mode: int = 0
    ) -> tuple[int, Attributes]:
        check_name(name)
        with who.note.begin():
            self.create_as_requester(parent, who, create, mode)
        return self.lookup(parent, name)

    def create_as_requester(self, parent: int, who: Requester, create: Callable[[int], _Result], mode: int) -> _Result:
        """Create an object in a directory with the requester's credentials.

        Args:
            parent: the directory.
            who: the requester.
            create: creates the object; gets the directory's descriptor.
            mode: the permissions of the object. If its group comes from the directory, only members of that group can
                create it with the set-group-ID bit.
        """
        by_group = True if mode & stat.S_ISGID else None
        return self._retry_without_pins(lambda: self._create_as(who, parent, create, by_group))

    def _create_as(
        self, who: Requester, parent: int, create: Callable[[int], _Result], by_group: bool | None
    ) -> _Result:
        directory = self.directory_fds.directory(parent)
        self._setid.clear(False)  # root can create a set-group-ID file for any group
        with self.permissions.creating(who, directory, by_group=by_group):
            return create(directory)

    def _retry_without_pins(self, act: Callable[[], _Result], nodeid: int = 0) -> _Result:
        """Call *act*. If there is no space, unpin removed files that are not open, and try again.

        Args:
            act: makes the system call.
            nodeid: an inode that it needs, which stays pinned.
        """
        try:
            return act()
        except OSError as error:
            if error.errno not in _NO_SPACE or not self.directory_fds.pins.release_unused(
                self._handles.open_inodes(), nodeid
            ):
                raise
        return act()

    def link(self, nodeid: int, parent: int, name: bytes, who: Requester) -> tuple[int, Attributes]:
        """Give an inode another name (linkat(2))."""
        check_name(name)
        with who.note.begin():
            attributes = self._retry_without_pins(lambda: self._link(nodeid, parent, name, who), nodeid)
        nodeid = self.inodes.remember(parent, name, attributes)
        self.note_new_name(nodeid)
        return nodeid, attributes

    def note_new_name(self, nodeid: int) -> None:
        """Unpin a file that had no name, because a name leads to it now."""
        self.directory_fds.pins.drop(nodeid)

    def _link(self, nodeid: int, parent: int, name: bytes, who: Requester) -> Attributes:
        with self._reach(nodeid) as reached:
            try:
                self._link_as(who, reached.fd, parent, name)
            except OSError as error:
                if error.errno != errno.EXDEV or not self._link_on_mount(nodeid, parent, name, who):
                    raise
            if self._leadership.is_leader:
                return fstatx(reached.fd)
        return statx(self.directory_fds.directory(parent), name)

    def _link_as(self, who: Requester, fd: int, parent: int, name: bytes) -> None:
        directory = self.directory_fds.directory(parent)
        with self.permissions.changing_names(who, directory, fd):
            self._call(_link, fd, directory, name)

    def _link_on_mount(self, nodeid: int, parent: int, name: bytes, who: Requester) -> bool:
        """Link a file through another of its names, which may be on the same mount as the new name."""
        for old_parent, old_name in self.directory_fds.places(nodeid):
            other = self.directory_fds.open_name(nodeid, old_parent, old_name)
            if other is not None:
                with Reached(other, is_path=True, is_own=True), suppress(OSError):
                    self._link_as(who, other, parent, name)
                    return True
        return False

    def unlink(self, parent: int, name: bytes, who: Requester) -> None:
        """Remove a name of a file that is not a directory (unlink(2)).

        Raises:
            OSError: ESTALE if the name leads to another file than in the kernel's cache.
        """
        self._remove(parent, name, who, os.unlink)

    def rmdir(self, parent: int, name: bytes, who: Requester) -> None:
        """Remove an empty directory (rmdir(2)); fails as `unlink` does."""
        self._remove(parent, name, who, os.rmdir)

    def _remove(self, parent: int, name: bytes, who: Requester, remove: _Remove) -> None:
        directory = self.directory_fds.directory(parent)
        pin = os.open(check_name(name), _PIN, dir_fd=directory)
        try:
            attributes = fstatx(pin)
            nodeid = self._known_nodeid(parent, name, attributes)
            with (
                who.note.begin(attributes.ino, nodeid, pin=pin, victim=attributes.ino),
                self.permissions.changing_names(who, directory, owned=(attributes,)),
            ):
                self._call(remove, name, dir_fd=directory)
        except BaseException:
            os.close(pin)
            raise
        self.note_removed_name(nodeid, parent, name, pin, attributes.uid)

    def _known_nodeid(self, parent: int, name: bytes, attributes: Attributes) -> int:
        """Return the nodeid of the file of a name, after checking that it is the one in the kernel's cache.

        The request contains only the name, but the kernel has checked permissions of the inode in its cache.

        Raises:
            OSError: ESTALE if it is another file; the kernel then looks up the name again.
        """
        nodeid = self.inodes.known(parent, name, attributes)
        if nodeid is None:
            raise stale()
        return nodeid

    def note_removed_name(self, nodeid: int, parent: int, name: bytes, pin: int, uid: int) -> None:
        """Note that *name* was removed; pin the inode with *pin* if no other name leads to it, else close *pin*."""
        if self.inodes.unlinked(nodeid, parent, name):
            if self.directory_fds.is_reachable(nodeid):
                os.close(pin)
                return
            self.inodes.drop_names(nodeid)
        self.directory_fds.pins.add(nodeid, pin, uid)

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, who: Requester) -> None:
        """Rename with RENAME_ flags (renameat2(2)).

        Raises:
            OSError: ESTALE if a name leads to another file than in the kernel's cache.
        """
        old_directory = self.directory_fds.directory(parent)
        new_directory = self.directory_fds.directory(new_parent)
        check_name(name)
        check_name(new_name)
        moved_attributes = statx(old_directory, name)
        moved = self._known_nodeid(parent, name, moved_attributes)
        victim = self._pin_if_there(new_directory, new_name)
        try:
            owned: tuple[Attributes, ...] = (moved_attributes,)
            target = 0
            if victim is not None:
                owned = (moved_attributes, fstatx(victim))
                target = self._known_nodeid(new_parent, new_name, owned[1])
            # To get another parent, a directory must be writable itself.
            by_group = True if parent != new_parent and any(stat.S_ISDIR(one.mode) for one in owned) else None
            pin, victim_ino = (-1, 0) if victim is None else (victim, owned[1].ino)
            with who.note.begin(moved_attributes.ino, moved, target, pin, victim_ino):
                self._retry_without_pins(
                    lambda: self._rename_as(who, parent, name, new_parent, new_name, flags, owned, by_group)
                )
        except BaseException:
            if victim is not None:
                os.close(victim)
            raise
        self.note_renamed(moved, (parent, name), (new_parent, new_name), flags, target, victim, owned[-1].uid)

    def note_renamed(
        self,
        moved: int,
        old: tuple[int, bytes],
        new: tuple[int, bytes],
        flags: int,
        target: int,
        victim: int | None,
        uid: int,
    ) -> None:
        """Update the inode table after a rename.

        Args:
            moved: the inode that was renamed.
            old, new: its old and new place, each a directory and a name.
            flags: the RENAME_ flags.
            target: the inode that had the new name, 0 if there was none.
            victim: a descriptor of that inode, which is closed or kept as a pin here, or None.
            uid: the owner of that inode.
        """
        exchanged = bool(flags & syscalls.RENAME_EXCHANGE)
        if victim is not None and (exchanged or target == moved):
            os.close(victim)
        elif victim is not None:
            self.note_removed_name(target, *new, victim, uid)
        if target == moved:  # two names of one file: rename(2) leaves both
            return
        if exchanged:
            self.inodes.renamed(target, new, old)
        self.inodes.renamed(moved, old, new)

    def _rename_as(
        self,
        who: Requester,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int,
        owned: tuple[Attributes, ...],
        by_group: bool | None,
    ) -> None:
        old, new = self.directory_fds.directory(parent), self.directory_fds.directory(new_parent)
        with self.permissions.changing_names(who, old, new, owned=owned, by_group=by_group):
            if flags:
                self._call(syscalls.renameat2, old, name, new, new_name, flags)
            else:  # every file system supports this call
                self._call(os.rename, name, new_name, src_dir_fd=old, dst_dir_fd=new)

    @staticmethod
    def _pin_if_there(directory: int, name: bytes) -> int | None:
        try:
            return os.open(name, _PIN, dir_fd=directory)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    # Attributes

    def getattr(self, nodeid: int) -> Attributes:
        """Return the attributes of an inode."""
        handles = self._handles.of_inode(nodeid)
        return fstatx(handles[0].descriptor) if handles else self.directory_fds.attributes(nodeid)

    def _reach(self, nodeid: int) -> Reached:
        """Return a descriptor of an inode: of an open file, else by its name."""
        handles = self._handles.of_inode(nodeid)
        if handles:
            return Reached(handles[0].descriptor, is_path=False, is_own=False)
        return self.directory_fds.reach(nodeid)

    def _reach_to_truncate(self, nodeid: int) -> Reached:
        """Return a descriptor of an inode that is open for writing. Open files may be open for reading only."""
        handles = self._handles.of_inode(nodeid)
        if handles:
            fd, _ = self.directory_fds.open_again(handles[0].descriptor, _TO_TRUNCATE)
        else:
            fd, _ = self.directory_fds.open(nodeid, _TO_TRUNCATE | os.O_NOFOLLOW)
        return Reached(fd, is_path=False, is_own=True)

    def setattr(self, nodeid: int, changes: Changes, handle: int | None, who: Requester) -> Attributes:
        """Change attributes of an inode and return its new attributes.

        Args:
            nodeid: the inode.
            changes: the changes.
            handle: an open file that is truncated, or whose times the kernel has cached; or None.
            who: the requester.
        """
        if changes.valid & CHANGES:
            attributes = self._retry_without_pins(lambda: self._set(nodeid, changes, handle, who), nodeid)
        else:
            with self._reach(nodeid) as reached:
                self._killpriv.clear_privileges(reached, nodeid, changes.valid, who)
            attributes = self.getattr(nodeid)
        for one in self._handles.of_inode(nodeid):
            one.note_mode(attributes)
        return attributes

    def _set(self, nodeid: int, changes: Changes, handle: int | None, who: Requester) -> Attributes:
        left = changes.valid
        while True:
            truncate = left & fuse.FATTR_SIZE and handle is None
            with self._reach_to_truncate(nodeid) if truncate else self._reach(nodeid) as reached:
                while left & CHANGES:
                    left &= ~self._apply(reached, left, changes, handle, who)
                    if not self._leadership.is_leader:
                        break
                else:
                    return fstatx(reached.fd)

    def _apply(self, reached: Reached, valid: int, changes: Changes, handle: int | None, who: Requester) -> int:
        """Make the first of the *changes* in *valid*; return its FATTR_ bits."""
        fd = reached.fd
        if valid & (fuse.FATTR_UID | fuse.FATTR_GID):
            uid = changes.uid if valid & fuse.FATTR_UID else -1
            gid = changes.gid if valid & fuse.FATTR_GID else -1
            self._change_owner(fd, uid, gid, who)
            return fuse.FATTR_UID | fuse.FATTR_GID
        if valid & fuse.FATTR_MODE:
            self._setid.clear(False)
            self._change_mode(reached, stat.S_IMODE(changes.mode), who)
            return fuse.FATTR_MODE
        if valid & fuse.FATTR_SIZE:
            if handle is None and not self.permissions.may(who, os.W_OK, fd, fstatx(fd)):
                raise denied()
            descriptor = fd if handle is None else self._handles.get(handle).descriptor
            with self._killpriv.setid_cleared(descriptor, bool(valid & fuse.FATTR_KILL_SUIDGID), who):
                self._call(os.ftruncate, descriptor, changes.size)
            return fuse.FATTR_SIZE
        self._change_times(fd, changes, handle, who)
        return _TIMES

    def _change_owner(self, fd: int, uid: int, gid: int, who: Requester) -> None:
        self._setid.clear(who.uid != 0)
        # In mandatory lock mode, the source checks the caller's groups before it clears the set-group-ID bit.
        with self.permissions.acting(who, fd, by_group=True):
            self._call(syscalls.chown, fd, uid, gid)

    def _change_mode(self, reached: Reached, mode: int, who: Requester) -> None:
        fd = reached.fd
        chmod = syscalls.chmod if reached.is_path else os.fchmod
        try:
            # Only a member of the file's group can set its set-group-ID bit; for others the source ignores the bit.
            with self.permissions.changing_attributes(who, fd, by_group=bool(mode & stat.S_ISGID)):
                self._call(chmod, fd, mode)
        except PermissionError:
            if not self._clears_setid or not self._leadership.is_leader:
                raise
            current = stat.S_IMODE(fstatx(fd).mode)
            if (
                mode == current or mode & ~current or current & ~mode & ~SETID_BITS
            ):  # the change does more than clear set-ID bits
                raise
            self._call(chmod, fd, mode)

    def _change_times(self, fd: int, changes: Changes, handle: int | None, who: Requester) -> None:
        valid = changes.valid
        atime = _time(valid, fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, changes.atime)
        mtime = _time(valid, fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, changes.mtime)
        is_touch = valid & fuse.FATTR_ATIME_NOW and (
            valid & fuse.FATTR_MTIME_NOW or (valid & fuse.FATTR_CTIME and changes.mtime == changes.ctime)
        )
        if handle is not None or valid & fuse.FATTR_SIZE or self.permissions.is_trusted(who):
            self._call(syscalls.utimens, fd, atime, mtime)  # write permission suffices, because writes change times
        elif is_touch:
            # Setting both to the current time needs no ownership. With --writeback, the kernel sends its own time.
            attributes = fstatx(fd)
            if not self.permissions.owns(who, attributes) and not self.permissions.may(who, os.W_OK, fd, attributes):
                raise denied()
            self._call(syscalls.utimens, fd, atime, mtime)
        else:
            attributes = fstatx(fd)
            try:
                with self.permissions.changing_attributes(who, fd, by_group=False):
                    self._call(syscalls.utimens, fd, atime, mtime)
            except PermissionError:
                # With --writeback, the kernel writes back cached times as the user whose call triggered it. The source
                # has set its own times when the data was written, and keeps them.
                if not valid & fuse.FATTR_CTIME or not _can_be_kept(changes, attributes):
                    raise

    def readlink(self, nodeid: int) -> bytes:
        """Return the target of a symlink (readlink(2))."""
        with self._reach(nodeid) as reached:
            return os.readlink(b"", dir_fd=reached.fd)

    def statfs(self, nodeid: int) -> os.statvfs_result:
        """Return statvfs(3) of the file system of an inode, which may be mounted below the source."""
        with self._reach(nodeid) as reached:
            return os.fstatvfs(reached.fd)

    # Extended attributes

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int, who: Requester, *, kill_sgid: bool) -> None:
        """Set an extended attribute (setxattr(2)).

        Args:
            nodeid: the inode.
            name: the attribute's name with its namespace.
            value: its new value.
            flags: XATTR_CREATE, XATTR_REPLACE or 0.
            who: the requester.
            kill_sgid: whether a new access ACL clears the set-group-ID bit.
        """
        self._setid.clear(kill_sgid)
        exists = bool(flags & os.XATTR_CREATE) and self.has_xattr(nodeid, name)
        with who.note.begin(int(exists)):
            self._retry_without_pins(lambda: self._setxattr(nodeid, name, value, flags, who), nodeid)

    def has_xattr(self, nodeid: int, name: bytes) -> bool:
        """Return whether an inode has an extended attribute; True if this process may not know."""
        with self._reach(nodeid) as reached:
            return _has_xattr(reached.target, name)

    def _setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int, who: Requester) -> None:
        with self._reach(nodeid) as reached, self.permissions.setting_xattr(who, reached.fd, name):
            self._call(os.setxattr, reached.target, name, value, flags)

    def getxattr(self, nodeid: int, name: bytes, who: Requester) -> bytes:
        """Return the value of an extended attribute (getxattr(2))."""
        with self._reach(nodeid) as reached:
            # Only reading user attributes needs read permission (xattr(7)).
            if name.startswith(b"user.") and not self.permissions.may(who, os.R_OK, reached.fd, fstatx(reached.fd)):
                raise denied()
            return os.getxattr(reached.target, name)

    def listxattr(self, nodeid: int, who: Requester) -> list[bytes]:
        """Return the names of the extended attributes (listxattr(2)); trusted ones only for root, as in the source."""
        with self._reach(nodeid) as reached:
            names = [os.fsencode(name) for name in os.listxattr(reached.target)]
        if self.permissions.may_see_trusted(who):
            return names
        return [name for name in names if not name.startswith(b"trusted.")]

    def removexattr(self, nodeid: int, name: bytes, who: Requester) -> None:
        """Remove an extended attribute (removexattr(2)) for *who*."""
        with self._reach(nodeid) as reached:
            if name == CAPABILITY and not self._killpriv.clears_capability(reached, nodeid, who):
                return
            with who.note.begin(int(_has_xattr(reached.target, name))):
                if name == CAPABILITY:
                    # The kernel also sends this for a user who writes to the file. If a user removes it explicitly, the
                    # kernel has checked the user's capability.
                    self._call(os.removexattr, reached.target, name)
                else:
                    with self.permissions.setting_xattr(who, reached.fd, name):
                        self._call(os.removexattr, reached.target, name)

    def clears_capability(self, nodeid: int, who: Requester) -> bool:
        """See `KillPriv.clears_capability`."""
        with self._reach(nodeid) as reached:
            return self._killpriv.clears_capability(reached, nodeid, who)

    # File attributes

    def get_file_attributes(self, handle: Handle, command: int, size: int) -> bytes:
        """Return flags or ``struct fsxattr`` of an open file.

        Args:
            handle: the file.
            command: FS_IOC_GETFLAGS or FS_IOC_FSGETXATTR.
            size: how many bytes the command returns.

        Raises:
            OSError: ENOTTY if the source's file system has no such attributes.
        """
        return bytes(fcntl.ioctl(handle.descriptor, command, bytes(size)))

    def set_file_attributes(self, handle: Handle, command: int, value: bytes, who: Requester) -> None:
        """Set flags, extended flags or project id of an open file.

        Args:
            handle: the file.
            command: FS_IOC_SETFLAGS or FS_IOC_FSSETXATTR.
            value: what the command takes.
            who: the caller; the source checks its rights.

        Raises:
            OSError: EPERM if the caller is not the owner, or lacks CAP_LINUX_IMMUTABLE for append-only and immutable.
        """
        with self.permissions.setting_file_attributes(who, handle.descriptor):
            self._call(fcntl.ioctl, handle.descriptor, command, value)

    # Only for llloop's own loop

    def statx_raw(self, nodeid: int, mask: int, flags: int, handle: Handle | None = None) -> bytearray:
        """Return an inode's ``struct statx`` (statx(2)) with its inode number in the mount.

        Args:
            nodeid: the inode.
            mask: the requested STATX_ fields.
            flags: the AT_STATX_ synchronisation flags.
            handle: an open file of this inode, or None.
        """
        if handle is not None:
            raw = syscalls.fstatx_raw(handle.descriptor, mask, flags)
        else:
            with self._reach(nodeid) as reached:
                raw = syscalls.fstatx_raw(reached.fd, mask, flags)
        inode = self.inodes.get(nodeid)
        shown = self.inodes.shown(inode.device, inode.number)
        raw[syscalls.STATX_INO_OFFSET : syscalls.STATX_INO_OFFSET + 8] = shown.to_bytes(8, sys.byteorder)
        return raw


def _can_be_kept(changes: Changes, attributes: Attributes) -> bool:
    """Return whether the kernel can have cached this mtime as the time of a cached write (--writeback).

    The source has another mtime, because it sets its own when the data arrives.
    """
    return changes.mtime <= changes.ctime and changes.mtime[0] >= attributes.mtime - _MAX_CACHED_TIME


def _link(fd: int, directory: int, name: bytes) -> None:
    """Give the file of *fd* (O_PATH suffices) another name (linkat(2))."""
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)


def _has_xattr(target: int | str, name: bytes) -> bool:
    """Return whether a file has an extended attribute; True if this process may not know."""
    try:
        os.getxattr(target, name)
    except OSError as error:
        return error.errno != errno.ENODATA
    return True


def _time(valid: int, given: int, now: int, value: tuple[int, int]) -> tuple[int, int]:
    """Return a time for utimensat(2)."""
    if valid & now:
        return 0, syscalls.UTIME_NOW
    return value if valid & given else (0, syscalls.UTIME_OMIT)
