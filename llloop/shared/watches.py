"""The inotify watches of directories that the kernel knows, in memory that the front and the watcher share (`--watch`).

inotify(7) tells which directory an event is of, and the name in it, but not which inode. So the front notes here:

* for each watch, the nodeid of its directory, and for each directory its watch;
* for each name in a watched directory, the nodeid to which it led. The cells of a name are found by its hash, and other
  names can use the same ones. So the watcher finds a few nodeids too many, never one too few. A name that finds no free
  cell is not noted, and its inode keeps the timeouts of a mount without `--watch`.

Each cell is changed by one store. The front fills cells; the watcher only empties them.
"""

from __future__ import annotations

import zlib

from llloop.linux import inotify
from llloop.linux.inotify import (
    IN_ATTRIB,
    IN_CLOSE_WRITE,
    IN_CREATE,
    IN_DELETE,
    IN_DELETE_SELF,
    IN_MODIFY,
    IN_MOVE_SELF,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    IN_ONLYDIR,
)
from llloop.shared.sparse_memory import sparse_memory
from llloop.shared.table import DEFAULT_CAPACITY, Table
from llloop.shared.watch_state import WatchState

_EVENTS = (
    IN_CREATE
    | IN_DELETE
    | IN_MOVED_FROM
    | IN_MOVED_TO
    | IN_MODIFY
    | IN_ATTRIB
    | IN_CLOSE_WRITE
    | IN_DELETE_SELF
    | IN_MOVE_SELF
    | IN_ONLYDIR
)

_WATCHES = 1 << 20  # the kernel numbers watches in sequence, so that few use the same cell
_WATCH_MASK = _WATCHES - 1
_PLACE_MASK = DEFAULT_CAPACITY - 1
_BUCKETS = 1 << 18
_BUCKET_MASK = _BUCKETS - 1
_NAMES_IN_BUCKET = 4

# What `_numbers` has for a directory that the kernel knows and that could not be watched.
_UNWATCHED = 0xFFFFFFFF
# The other programs of the user need watches, too.
_SHARE = 2


class Watches:
    """The watches, and what leads from events to inodes.

    Attributes:
        fd: the inotify instance.

    Args:
        state: counts the directories that are watched, and those that are not.
        table: the inode table.

    Raises:
        OSError: the user has no inotify instance left.
    """

    def __init__(self, state: WatchState, table: Table) -> None:
        self._state = state
        self._table = table
        self._limit = min(-(-inotify.max_user_watches() // _SHARE), _WATCHES // 2)
        self.fd = inotify.inotify_init()
        names = 8 * _WATCHES
        numbers = names + 8 * _BUCKETS * _NAMES_IN_BUCKET
        size = numbers + 4 * DEFAULT_CAPACITY
        self._memory = memoryview(sparse_memory("llloop-watches", size))
        self._owners = self._memory[:names].cast("Q")  # nodeid by number of the watch
        self._names = self._memory[names:numbers].cast("Q")
        self._numbers = self._memory[numbers:].cast("I")  # number of the watch by place of the nodeid

    # The front

    def is_watched(self, nodeid: int) -> bool:
        """Return whether a directory is watched."""
        number = self._numbers[nodeid & _PLACE_MASK]
        return number not in (0, _UNWATCHED) and self._owners[number & _WATCH_MASK] == nodeid

    @property
    def is_full(self) -> bool:
        """Whether no more directories may be watched."""
        return self._state.directories >= self._limit

    def add(self, nodeid: int, fd: int) -> bool:
        """Watch a directory; return whether it is watched.

        Args:
            nodeid: the directory.
            fd: a descriptor of it.
        """
        place = nodeid & _PLACE_MASK
        try:
            number = inotify.add_watch(self.fd, fd, _EVENTS)
        except OSError:  # beyond the user's limit, or not readable
            self.miss(nodeid)
            return False
        owner = self._owners[number & _WATCH_MASK]
        if owner and owner != nodeid:  # the same directory by another mount; or another one that uses this cell
            if self._numbers[owner & _PLACE_MASK] != number:
                inotify.remove_watch(self.fd, number)
            self.miss(nodeid)
            return False
        self._state.count_directories(watched=not owner, missed=-(self._numbers[place] == _UNWATCHED))
        self._numbers[place] = number
        self._owners[number & _WATCH_MASK] = nodeid
        return True

    def miss(self, nodeid: int) -> None:
        """Note that a directory cannot be watched."""
        place = nodeid & _PLACE_MASK
        if self._numbers[place] != _UNWATCHED:
            self._numbers[place] = _UNWATCHED
            self._state.count_directories(missed=1)

    def remove(self, nodeid: int) -> None:
        """End the watch of an inode that the kernel has forgotten, if it is a directory."""
        place = nodeid & _PLACE_MASK
        number = self._numbers[place]
        if not number:
            return
        self._numbers[place] = 0
        if number == _UNWATCHED:
            self._state.count_directories(missed=-1)
        elif self._owners[number & _WATCH_MASK] == nodeid:
            self._owners[number & _WATCH_MASK] = 0
            inotify.remove_watch(self.fd, number)
            self._state.count_directories(watched=-1)

    def note_name(self, directory: int, name: bytes, nodeid: int) -> bool:
        """Note that a name in a watched directory leads to an inode; return False if there is no room."""
        names = self._names
        first = _bucket_of(directory, name)
        free = -1
        for place in range(first, first + _NAMES_IN_BUCKET):
            known = names[place]
            if known == nodeid:
                return True
            if free < 0 and not (known and known in self._table):
                free = place
        if free < 0:
            return False
        names[free] = nodeid
        return True

    def has_name(self, directory: int, name: bytes, nodeid: int) -> bool:
        """Return whether `note_name` was called for a name since it was last changed."""
        first = _bucket_of(directory, name)
        return nodeid in self._names[first : first + _NAMES_IN_BUCKET].tolist()

    # The watcher

    def directory(self, number: int) -> int:
        """Return the nodeid of the directory of a watch, 0 if the kernel has forgotten it."""
        nodeid = self._owners[number & _WATCH_MASK]
        return nodeid if nodeid and self._numbers[nodeid & _PLACE_MASK] == number else 0

    def ended(self, number: int) -> None:
        """Note that the source's kernel has ended a watch, because the directory or its file system is gone."""
        if self.directory(number):
            self._owners[number & _WATCH_MASK] = 0
            self._state.count_ended()

    def inodes(self, directory: int, name: bytes, *, changed: bool) -> list[int]:
        """Return the nodeids to which a name in a directory may have led; if the name has *changed*, forget them."""
        first = _bucket_of(directory, name)
        found = [nodeid for nodeid in self._names[first : first + _NAMES_IN_BUCKET].tolist() if nodeid]
        if changed and found:
            for place in range(first, first + _NAMES_IN_BUCKET):
                self._names[place] = 0
        return found

    def forget_names(self) -> None:
        """Forget to what names lead, because events were lost."""
        self._names[:] = memoryview(bytes(self._names.nbytes)).cast("Q")


def _bucket_of(directory: int, name: bytes) -> int:
    return (zlib.crc32(name, directory * 0x9E3779B1 & 0xFFFFFFFF) & _BUCKET_MASK) * _NAMES_IN_BUCKET
