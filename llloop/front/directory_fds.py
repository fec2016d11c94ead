"""Access to inodes: through the descriptor of a directory and a name, or through a pin.

Directories are opened with O_PATH and stay open; the least recently used ones are closed. Every access uses one name
relative to such a descriptor, and does not follow symlinks. So nothing leads out of the source. If an inode loses its
last known name while the kernel still knows it, an O_PATH descriptor *pins* it until the kernel forgets it.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType

from llloop.front.inodes import ROOT, Inode, Inodes, stale
from llloop.front.pins import Pins
from llloop.linux.syscalls import Attributes, fstatx, statx
from llloop.shared.leadership import Leadership

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Errors that mean that the name does not lead to the inode any more (ELOOP: it is a symlink now).
_MOVED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP})
# The mount flags that restrict what the file system allows (statvfs(3)).
_MOUNT_FLAGS = os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
_ANY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Reached:
    """A descriptor of one inode for a ``with`` block.

    Attributes:
        fd: the descriptor.
        is_path: whether it was opened with O_PATH.
        target: the descriptor or a path of the inode, for calls of ``os`` that do not accept O_PATH descriptors.
    """

    __slots__ = ("_is_own", "fd", "is_path", "target")

    def __init__(self, fd: int, *, is_path: bool, is_own: bool) -> None:
        self.fd = fd
        self.is_path = is_path
        self.target: int | str = f"/proc/self/fd/{fd}" if is_path else fd
        self._is_own = is_own

    def __enter__(self) -> Reached:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_own:
            os.close(self.fd)


class DirectoryFds:
    """The descriptors of directories.

    Args:
        inodes: the inode table.
        root: an O_PATH descriptor of the source; the caller keeps it.
        capacity: how many directories stay open.
        pins: the descriptors of inodes without names.
        leadership: decides which thread serves.
        closing: a list for descriptors to close later, because closing may take long.
    """

    def __init__(
        self, inodes: Inodes, root: int, capacity: int, pins: Pins, leadership: Leadership, closing: list[int]
    ) -> None:
        self._leadership = leadership
        self._closing = closing
        self._inodes = inodes
        self._root = root
        self._capacity = max(capacity, 2)
        self._directories: OrderedDict[int, int] = OrderedDict()
        self._returned = ROOT  # the directory that `directory` returned last
        self.pins = pins
        inodes.is_alike = self._is_alike

    @property
    def kept(self) -> int:
        """The number of open descriptors of directories and removed files."""
        return len(self._directories) + len(self.pins)

    def directory(self, nodeid: int) -> int:
        """Return a descriptor of the directory *nodeid*, which is valid until the second call after this one.

        Raises:
            OSError: ESTALE if it is no longer at its last known path, or another error of open(2).
        """
        fd = self._held_directory(nodeid)
        if fd is None:
            fd = self._walk_to(nodeid)
        self._returned = nodeid
        return fd

    def _walk_to(self, nodeid: int) -> int:
        """Open a directory and those of its ancestors that are not open."""
        fd: int | None = None
        missing = {nodeid: None}  # the directories to open, from the bottom up
        parent = nodeid
        while fd is None:
            parent = self._inodes.get(parent).parent
            # After moves in the source, two directories may have been seen below each other.
            if parent == 0 or parent in missing:
                raise stale()
            fd = self._held_directory(parent)
            if fd is None:
                missing[parent] = None
        for number in reversed(missing):
            inode = self._inodes.get(number)
            fd = self._open(fd, inode, _DIRECTORY)
            self._directories[number] = fd
            self._make_room()
        return fd

    def _make_room(self) -> None:
        """Close the least recently used directories, but not the one that `directory` returned last."""
        directories = self._directories
        while len(directories) > self._capacity:
            oldest = next(iter(directories))
            if oldest == self._returned:
                directories.move_to_end(oldest)
            else:
                self._closing.append(directories.pop(oldest))

    def _held_directory(self, nodeid: int) -> int | None:
        fd = self._directories.get(nodeid)
        if fd is not None:
            self._directories.move_to_end(nodeid)
            return fd
        return self._root if nodeid == ROOT else self.pins.get(nodeid)

    def held(self, nodeid: int) -> int | None:
        """Return an open descriptor of *nodeid*, or None."""
        fd = self.pins.get(nodeid)
        if fd is None:
            fd = self._directories.get(nodeid)
        return self._root if fd is None and nodeid == ROOT else fd

    @staticmethod
    def _open(directory: int, inode: Inode, flags: int) -> int:
        try:
            fd = os.open(inode.name, flags, dir_fd=directory)
        except OSError as error:
            raise stale() if error.errno in _MOVED else error from None
        if not inode.is_same(fstatx(fd)):
            os.close(fd)
            raise stale()
        return fd

    def _is_alike(self, directory: int, name: bytes) -> bool:
        """Return whether the mount of *name* in *directory* (of *directory* if empty) has the source's mount flags."""
        try:
            fd = os.open(name or b".", _ANY, dir_fd=self.directory(directory))
        except OSError:
            return False
        try:
            return not (os.fstatvfs(fd).f_flag ^ os.fstatvfs(self._root).f_flag) & _MOUNT_FLAGS
        finally:
            os.close(fd)

    def open_name(self, nodeid: int, parent: int, name: bytes) -> int | None:
        """Return an O_PATH descriptor of *nodeid* if *name* in *parent* still leads to it, else None."""
        try:
            fd = os.open(name, _ANY, dir_fd=self.directory(parent))
        except OSError:
            return None
        if self._inodes.get(nodeid).is_same(fstatx(fd)):
            return fd
        os.close(fd)
        return None

    def places(self, nodeid: int) -> list[tuple[int, bytes]]:
        """Return each known (parent, name) of *nodeid*, the latest first."""
        return self._inodes.names(self._inodes.get(nodeid))

    def attributes(self, nodeid: int) -> Attributes:
        """Return the attributes of *nodeid*.

        Raises:
            OSError: ESTALE if none of its known names leads to it any more.
        """
        fd = self.held(nodeid)
        if fd is not None:
            return fstatx(fd)
        inode = self._inodes.get(nodeid)
        for parent, name in self._inodes.names(inode):
            try:
                attributes = statx(self.directory(parent), name)
            except OSError as error:
                if error.errno in _MOVED:
                    continue
                raise
            if inode.is_same(attributes):
                return attributes
        raise stale()

    def is_reachable(self, nodeid: int) -> bool:
        """Return whether one of the known names of *nodeid* still leads to it."""
        try:
            self.attributes(nodeid)
        except OSError:
            return False
        return True

    def reach(self, nodeid: int) -> Reached:
        """Return an O_PATH descriptor of *nodeid* for a ``with`` block.

        Raises:
            OSError: ESTALE if none of its known names leads to it any more.
        """
        held = self.held(nodeid)
        if held is not None:
            return Reached(held, is_path=True, is_own=False)
        fd, _ = self.open(nodeid, _ANY)
        return Reached(fd, is_path=True, is_own=True)

    def open(self, nodeid: int, flags: int) -> tuple[int, Attributes]:
        """Open *nodeid* with open(2) *flags*, by its pin or one of its known names.

        Returns:
            The new descriptor and the file's attributes.

        Raises:
            OSError: ESTALE if none of its known names leads to it any more, or another error of open(2).
        """
        inode = self._inodes.get(nodeid)
        pin = self.pins.get(nodeid)
        if pin is not None:
            return self.open_again(pin, flags)
        if nodeid == ROOT:
            fd = os.open(".", flags, dir_fd=self._root)
            return fd, fstatx(fd)
        # Opening a device can have effects, and opening a FIFO wakes a process that waits for it. So the name is only
        # opened for I/O once it is known to lead to the inode.
        is_harmless = flags & (os.O_PATH | os.O_DIRECTORY)
        for parent, name in self._inodes.names(inode):
            try:
                fd = os.open(name, flags if is_harmless else _ANY, dir_fd=self.directory(parent))
            except OSError as error:
                if error.errno in _MOVED:
                    continue
                raise
            attributes = fstatx(fd)
            if inode.is_same(attributes):
                if is_harmless:
                    return fd, attributes
                with Reached(fd, is_path=True, is_own=True):
                    return self.open_again(fd, flags)
            os.close(fd)
        raise stale()

    def open_again(self, fd: int, flags: int) -> tuple[int, Attributes]:
        """Open the file of *fd* (O_PATH suffices) with other *flags*; for the result see `open`."""
        # Opening for writing waits for a frozen file system.
        open_ = os.open if flags & os.O_ACCMODE == os.O_RDONLY else self._open_writing
        opened = open_(f"/proc/self/fd/{fd}", flags & ~os.O_NOFOLLOW)
        return opened, fstatx(opened)

    def _open_writing(self, path: str, flags: int) -> int:
        return self._leadership.call(os.open, path, flags)

    def drop(self, nodeid: int) -> None:
        """Close the descriptors of *nodeid*, because the kernel has forgotten it."""
        self.pins.drop(nodeid)
        directory = self._directories.pop(nodeid, None)
        if directory is not None:
            self._closing.append(directory)

    @property
    def root(self) -> int:
        """The descriptor of the source."""
        return self._root

    def close_where(self, condition: Callable[[int], bool]) -> None:
        """Close the directories whose descriptors meet a condition, after the current request is answered."""
        for nodeid, fd in list(self._directories.items()):
            if condition(fd):
                del self._directories[nodeid]
                self._closing.append(fd)

    def shrink(self) -> None:
        """Close all directories that can be reopened. Called when descriptors run out."""
        for fd in self._directories.values():
            if self._leadership.is_in_use(fd):
                self._closing.append(fd)
            else:
                os.close(fd)
        self._directories.clear()
