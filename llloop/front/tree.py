"""The mirrored tree: every request on names and attributes, as system calls on the source.

No FUSE struct and no llfuse type appears here; `operations` and `native` translate. Errors are
`OSError` with the source's errno.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, Protocol, TypeVar

from .. import syscalls, wire
from ..leadership import Leadership
from ..privilege import Caller, SetidGuard
from ..syscalls import Attributes, find, fstatx, statx
from .anchors import Anchors, Reached
from .attempts import Attempt, Attempts
from .handles import Handle, Handles
from .inodes import Inodes
from .privileges import CAPABILITY, Privileges
from .requester import Requester

_PIN = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_TO_TRUNCATE = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
_NO_NAMES = frozenset({b"", b".", b".."})
_TIMES = wire.FATTR_ATIME | wire.FATTR_ATIME_NOW | wire.FATTR_MTIME | wire.FATTR_MTIME_NOW
_SETS = wire.FATTR_MODE | wire.FATTR_UID | wire.FATTR_GID | wire.FATTR_SIZE | _TIMES


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_Made = TypeVar("_Made")


class _Remove(Protocol):
    """os.unlink or os.rmdir."""

    def __call__(self, path: bytes, /, *, dir_fd: int) -> None: ...


def check_name(name: bytes) -> bytes:
    """Refuse a name that could lead elsewhere; no kernel sends one, but nothing may depend on that."""
    if name in _NO_NAMES or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return name


class Changes(NamedTuple):
    """What a SETATTR request asks for, in its own terms.

    Attributes:
        valid: the FATTR_ bits that say which of the others count.
        mode, uid, gid, size: the new values.
        atime, mtime: seconds and nanoseconds.
    """

    valid: int
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    atime: tuple[int, int] = (0, 0)
    mtime: tuple[int, int] = (0, 0)


class Tree:
    """The namespace and the attributes of the source.

    Args:
        root: an O_PATH descriptor of the source directory.
        inodes: the inode table.
        anchors: how inodes are reached.
        handles: the open files, through which an inode can be reached that lost its name behind the mount.
        attempts: tells of what a front before this one had begun and not answered.
        caller: acts as the requester where something is created.
        setid: decides about set-ID bits.
        privileges: takes from files what a change takes from them.
        leadership: which thread serves. Every change is made by its `call`: a file system that is frozen lets it wait.
            What was read before a call may be out of date after it, descriptors included that are not the request's
            own.
    """

    def __init__(
        self,
        root: int,
        inodes: Inodes,
        anchors: Anchors,
        handles: Handles,
        attempts: Attempts,
        caller: Caller,
        setid: SetidGuard,
        privileges: Privileges,
        leadership: Leadership,
    ) -> None:
        self._leadership = leadership
        self._call = leadership.call
        self._root = root
        self.inodes = inodes
        self.anchors = anchors
        self._handles = handles
        self._attempts = attempts
        self._caller = caller
        self._setid = setid
        self._privileges = privileges

    # Names

    def lookup(self, parent: int, name: bytes) -> tuple[int, Attributes]:
        """Return number and attributes of *name* in *parent*."""
        found = self.find(parent, name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return found

    def find(self, parent: int, name: bytes) -> tuple[int, Attributes] | None:
        """Return what `lookup` does, or None if there is no such name."""
        attributes = find(self.anchors.directory(parent), check_name(name))
        return None if attributes is None else (self.inodes.remember(parent, name, attributes), attributes)

    def forget(self, nodeid: int, lookups: int) -> None:
        """Take back *lookups* of an inode."""
        if self.inodes.forget(nodeid, lookups):
            self.anchors.drop(nodeid)

    def mknod(self, parent: int, name: bytes, mode: int, device: int, who: Requester) -> tuple[int, Attributes]:
        """Make a file, fifo, socket or device (mknod(2)); *device* is as makedev(3) gives it."""
        return self._make(parent, name, who, lambda at: self._call(os.mknod, name, mode, device, dir_fd=at))

    def mkdir(self, parent: int, name: bytes, mode: int, who: Requester) -> tuple[int, Attributes]:
        """Make a directory (mkdir(2))."""
        return self._make(parent, name, who, lambda at: self._call(os.mkdir, name, stat.S_IMODE(mode), dir_fd=at))

    def symlink(self, parent: int, name: bytes, target: bytes, who: Requester) -> tuple[int, Attributes]:
        """Make a symlink (symlink(2))."""
        return self._make(parent, name, who, lambda at: self._call(os.symlink, target, name, dir_fd=at))

    def _make(self, parent: int, name: bytes, who: Requester, make: Callable[[int], None]) -> tuple[int, Attributes]:
        check_name(name)
        attempt = self._attempts.interrupted()
        if attempt is None:
            self._attempts.begin()
        try:
            self.as_requester(parent, who, make)
        except FileExistsError:
            if attempt is None or not attempt.made(statx(self.anchors.directory(parent), name)):
                raise
        self._attempts.done()
        return self.lookup(parent, name)

    def as_requester(self, parent: int, who: Requester, make: Callable[[int], _Made]) -> _Made:
        """Make something in the directory *parent* that belongs to *who*; *make* gets the directory's descriptor."""
        with self._caller(who.uid, who.gid, who.umask):
            return self._with_room(lambda: make(self.anchors.directory(parent)))

    def _with_room(self, act: Callable[[], _Made], nodeid: int = 0) -> _Made:
        """Do what may take space. If there is none, do it again without the removed files that nobody has open.

        Args:
            act: does it.
            nodeid: an inode that it needs, whose pin stays.
        """
        try:
            return act()
        except OSError as error:
            if error.errno not in _FULL or not self.anchors.release_unused_pins(self._handles.open_inodes(), nodeid):
                raise
        return act()

    def link(self, nodeid: int, parent: int, name: bytes) -> tuple[int, Attributes]:
        """Give an inode one more name (linkat(2))."""
        check_name(name)
        attempt = self._attempts.interrupted()
        if attempt is None:
            self._attempts.begin()
        try:
            attributes = self._with_room(lambda: self._link(nodeid, parent, name), nodeid)
        except FileExistsError:
            attributes = statx(self.anchors.directory(parent), name)
            if attempt is None or not _is_same(attributes, self.getattr(nodeid)):
                raise
        return self.inodes.remember(parent, name, attributes), attributes

    def _link(self, nodeid: int, parent: int, name: bytes) -> Attributes:
        with self._reach(nodeid) as reached:
            try:
                self._call(_link, reached.fd, self.anchors.directory(parent), name)
            except OSError as error:
                if error.errno != errno.EXDEV or not self._link_on_mount(nodeid, parent, name):
                    raise
            if self._leadership.leads:
                return fstatx(reached.fd)
        return statx(self.anchors.directory(parent), name)

    def _link_on_mount(self, nodeid: int, parent: int, name: bytes) -> bool:
        """Link a file that was found on another mount: perhaps it was found on the new name's mount, too."""
        for old_parent, old_name in self.anchors.places(nodeid):
            other = self.anchors.open_name(nodeid, old_parent, old_name)
            if other is not None:
                with Reached(other, is_path=True, is_own=True), suppress(OSError):
                    self._call(_link, other, self.anchors.directory(parent), name)
                    return True
        return False

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name of anything but a directory (unlink(2))."""
        self._remove(parent, name, os.unlink)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory (rmdir(2))."""
        self._remove(parent, name, os.rmdir)

    def _remove(self, parent: int, name: bytes, remove: _Remove) -> None:
        directory = self.anchors.directory(parent)
        attempt = self._attempts.interrupted()
        if attempt is not None and _is_gone(directory, check_name(name), attempt.number, attempt.done):
            if attempt.has_pin():
                self._lost_name(attempt.nodeid or None, parent, name, attempt.pin)
            return
        pin = os.open(check_name(name), _PIN, dir_fd=directory)
        try:
            attributes = fstatx(pin)
            nodeid = self.inodes.known(parent, name, attributes)
            self._attempts.begin(attributes.ino, nodeid or 0, 0, pin, attributes.ino)
            self._call(remove, name, dir_fd=directory)
        except BaseException:
            os.close(pin)
            raise
        self._attempts.done()
        self._lost_name(nodeid, parent, name, pin)

    def _lost_name(self, nodeid: int | None, parent: int, name: bytes, pin: int) -> None:
        """Note that *name* is gone; keep *pin* if the kernel knows the inode and no other name leads to it."""
        if nodeid is None or (self.inodes.unlinked(nodeid, parent, name) and self.anchors.is_reachable(nodeid)):
            os.close(pin)
        else:
            self.anchors.pin(nodeid, pin)

    def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        """Rename with RENAME_ flags (renameat2(2))."""
        old_directory = self.anchors.directory(parent)
        new_directory = self.anchors.directory(new_parent)
        check_name(name)
        check_name(new_name)
        attempt = self._attempts.interrupted()
        if attempt is not None and _has_moved(old_directory, name, new_directory, new_name, flags, attempt):
            if attempt.nodeid and attempt.nodeid == attempt.target:  # two names of one file: rename(2) leaves both
                return
            exchanged = bool(flags & syscalls.RENAME_EXCHANGE)
            if not exchanged and attempt.has_pin():
                self._lost_name(attempt.target or None, new_parent, new_name, attempt.pin)
            elif exchanged and attempt.target:
                self.inodes.renamed(attempt.target, (new_parent, new_name), (parent, name))
            if attempt.nodeid:
                self.inodes.renamed(attempt.nodeid, (parent, name), (new_parent, new_name))
            return
        moved_attributes = statx(old_directory, name)
        moved = self.inodes.known(parent, name, moved_attributes)
        victim = self._pin_if_there(new_directory, new_name)
        try:
            victim_attributes = None if victim is None else fstatx(victim)
            target = None
            if victim_attributes is not None:
                target = self.inodes.known(new_parent, new_name, victim_attributes)
            self._attempts.begin(
                moved_attributes.ino,
                moved or 0,
                target or 0,
                -1 if victim is None else victim,
                0 if victim_attributes is None else victim_attributes.ino,
            )
            self._with_room(lambda: self._rename(parent, name, new_parent, new_name, flags))
        except BaseException:
            if victim is not None:
                os.close(victim)
            raise
        self._attempts.done()
        if victim is not None:
            if moved is not None and target == moved:  # two names of one file: rename(2) leaves both
                os.close(victim)
                return
            if flags & syscalls.RENAME_EXCHANGE:
                os.close(victim)
                if target is not None:
                    self.inodes.renamed(target, (new_parent, new_name), (parent, name))
            else:
                self._lost_name(target, new_parent, new_name, victim)
        if moved is not None:
            self.inodes.renamed(moved, (parent, name), (new_parent, new_name))

    def _rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        old, new = self.anchors.directory(parent), self.anchors.directory(new_parent)
        if flags:
            self._call(syscalls.renameat2, old, name, new, new_name, flags)
        else:  # the call that every file system knows
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
        return fstatx(handles[0].descriptor) if handles else self.anchors.attributes(nodeid)

    def _reach(self, nodeid: int) -> Reached:
        """Return a way to act on an inode and no other file: what is open of it, else what its name leads to."""
        handles = self._handles.of_inode(nodeid)
        if handles:
            return Reached(handles[0].descriptor, is_path=False, is_own=False)
        return self.anchors.reach(nodeid)

    def _reach_to_truncate(self, nodeid: int) -> Reached:
        """Return a descriptor that is open for writing; what is open of the file may be so for reading only."""
        handles = self._handles.of_inode(nodeid)
        if handles:
            fd = self._call(os.open, f"/proc/self/fd/{handles[0].descriptor}", _TO_TRUNCATE)
        else:
            fd, _ = self.anchors.open(nodeid, _TO_TRUNCATE | os.O_NOFOLLOW)
        return Reached(fd, is_path=False, is_own=True)

    def setattr(self, nodeid: int, changes: Changes, handle: int | None, who: Requester) -> Attributes:
        """Change attributes of an inode and return what they are then.

        Args:
            nodeid: the inode.
            changes: what to change.
            handle: an open file to truncate through, or None.
            who: the caller.
        """
        if changes.valid & _SETS:
            attributes = self._with_room(lambda: self._set(nodeid, changes, handle, who), nodeid)
        else:
            with self._reach(nodeid) as reached:
                self._privileges.give_up(reached, nodeid, changes.valid, who)
            attributes = self.getattr(nodeid)
        for one in self._handles.of_inode(nodeid):
            one.note_mode(attributes)
        return attributes

    def _set(self, nodeid: int, changes: Changes, handle: int | None, who: Requester) -> Attributes:
        left = changes.valid
        while True:
            truncate = left & wire.FATTR_SIZE and handle is None
            with self._reach_to_truncate(nodeid) if truncate else self._reach(nodeid) as reached:
                while left & _SETS:
                    left &= ~self._apply(reached, left, changes, handle, who)
                    if not self._leadership.leads:
                        break
                else:
                    return fstatx(reached.fd)

    def _apply(self, reached: Reached, valid: int, changes: Changes, handle: int | None, who: Requester) -> int:
        """Make the first of the *changes* that *valid* asks for, and return what of *valid* that was."""
        fd = reached.fd
        if valid & (wire.FATTR_UID | wire.FATTR_GID):
            uid = changes.uid if valid & wire.FATTR_UID else -1
            gid = changes.gid if valid & wire.FATTR_GID else -1
            with self._privileges.clearing(fd, who.uid != 0, who):
                self._call(syscalls.chown, fd, uid, gid)
            return wire.FATTR_UID | wire.FATTR_GID
        if valid & wire.FATTR_MODE:
            self._setid.clear(False)
            self._call(syscalls.chmod if reached.is_path else os.fchmod, fd, stat.S_IMODE(changes.mode))
            return wire.FATTR_MODE
        if valid & wire.FATTR_SIZE:
            descriptor = fd if handle is None else self._handles.get(handle).descriptor
            with self._privileges.clearing(descriptor, bool(valid & wire.FATTR_KILL_SUIDGID), who):
                self._call(os.ftruncate, descriptor, changes.size)
            return wire.FATTR_SIZE
        atime = _time(valid, wire.FATTR_ATIME, wire.FATTR_ATIME_NOW, changes.atime)
        mtime = _time(valid, wire.FATTR_MTIME, wire.FATTR_MTIME_NOW, changes.mtime)
        self._call(syscalls.utimens, fd, atime, mtime)
        return _TIMES

    def readlink(self, nodeid: int) -> bytes:
        """Return where a symlink points (readlink(2))."""
        with self._reach(nodeid) as reached:
            return os.readlink(b"", dir_fd=reached.fd)

    def statfs(self, nodeid: int) -> os.statvfs_result:
        """Return the state of the file system that holds an inode, which may be one mounted below SRC (statvfs(3))."""
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
            who: the caller.
            kill_sgid: whether a new access ACL clears the set-group-ID bit.
        """
        self._setid.clear(kill_sgid)
        attempt = self._attempts.interrupted()
        exists = bool(flags & os.XATTR_CREATE) and self._has_xattr(nodeid, name)
        if attempt is None:
            self._attempts.begin(int(exists))
        elif exists and not attempt.number:
            return
        # The blocks that it takes are the caller's, and the source asks for the caller's group.
        with self._caller(who.uid, who.gid):
            self._with_room(lambda: self._setxattr(nodeid, name, value, flags), nodeid)

    def _has_xattr(self, nodeid: int, name: bytes) -> bool:
        with self._reach(nodeid) as reached:
            return _has_xattr(reached.target, name)

    def _setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int) -> None:
        with self._reach(nodeid) as reached:
            self._call(os.setxattr, reached.target, name, value, flags)

    def getxattr(self, nodeid: int, name: bytes) -> bytes:
        """Return the value of an extended attribute (getxattr(2))."""
        with self._reach(nodeid) as reached:
            return os.getxattr(reached.target, name)

    def listxattr(self, nodeid: int, who: Requester) -> list[bytes]:
        """Return the names of the extended attributes (listxattr(2)); trusted ones only to root, as natively."""
        with self._reach(nodeid) as reached:
            names = [os.fsencode(name) for name in os.listxattr(reached.target)]
        return names if who.uid == 0 else [name for name in names if not name.startswith(b"trusted.")]

    def removexattr(self, nodeid: int, name: bytes, who: Requester) -> None:
        """Remove an extended attribute (removexattr(2)) for *who*."""
        with self._reach(nodeid) as reached:
            if name == CAPABILITY and not self._privileges.takes_capability(reached, nodeid, who):
                return
            attempt = self._attempts.interrupted()
            if attempt is None:
                self._attempts.begin(int(_has_xattr(reached.target, name)))
            elif attempt.number and not _has_xattr(reached.target, name):
                return
            self._call(os.removexattr, reached.target, name)

    # What llloop's own requests add

    def statx_raw(self, nodeid: int, mask: int, flags: int, handle: Handle | None = None) -> bytearray:
        """Return an inode's ``struct statx`` (statx(2)) with the inode number the mount shows.

        Args:
            nodeid: the inode.
            mask: the STATX_ fields asked for.
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


def _link(fd: int, directory: int, name: bytes) -> None:
    """Give the file behind *fd*, which may be opened with O_PATH, one more name (linkat(2))."""
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)


def _is_same(one: Attributes, other: Attributes) -> bool:
    return (one.ino, one.device) == (other.ino, other.device)


def _is_gone(directory: int, name: bytes, number: int, known: bool) -> bool:
    """Whether a name is gone that led to the inode *number*, or is *known* to be."""
    try:
        return known or statx(directory, name).ino != number
    except FileNotFoundError:
        return True


def _has_moved(old: int, name: bytes, new: int, new_name: bytes, flags: int, attempt: Attempt) -> bool:
    """Whether an attempt to rename has done so: then the new name leads to its file, and the old one does not."""
    if attempt.done:
        return True
    try:
        if statx(new, new_name).ino != attempt.number:
            return False
    except FileNotFoundError:
        return False
    return bool(flags & syscalls.RENAME_EXCHANGE) or _is_gone(old, name, attempt.number, False)


def _has_xattr(target: int | str, name: bytes) -> bool:
    """Whether there is an extended attribute, as far as one may know."""
    try:
        os.getxattr(target, name)
    except OSError as error:
        return error.errno != errno.ENODATA
    return True


def _time(valid: int, given: int, now: int, value: tuple[int, int]) -> tuple[int, int]:
    """Return a time as utimensat(2) takes it."""
    if valid & now:
        return 0, syscalls.UTIME_NOW
    return value if valid & given else (0, syscalls.UTIME_OMIT)
