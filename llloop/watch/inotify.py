"""Hearing with inotify: what the front watches (`llloop.shared.watches`), as an ordinary user or without file handles.

inotify does not tell who did something. So what is done through the mount counts as done by others: the kernel drops
a little too much, and nothing is told to programs that watch the mount, because they would hear of it twice.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from llloop.linux import inotify, syscalls
from llloop.linux.inotify import (
    IN_ATTRIB,
    IN_CLOSE_WRITE,
    IN_CREATE,
    IN_DELETE,
    IN_IGNORED,
    IN_ISDIR,
    IN_MODIFY,
    IN_MOVE_SELF,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    IN_Q_OVERFLOW,
)
from llloop.shared.table import Table
from llloop.shared.watch_state import Method
from llloop.shared.watches import Watches
from llloop.watch.events import Event, Operation
from llloop.watch.file_systems import CannotHear, FileSystems
from llloop.watch.parsing import Batch

_BUFFER = 256 * 1024
_NOBODY = 0  # the process is unknown

# Magic numbers of <linux/magic.h>: file systems that nobody changes but this machine, by its system calls. ext2 to
# ext4, XFS, Btrfs, F2FS, tmpfs, ramfs, overlayfs, ecryptfs, ZFS, bcachefs, FAT, exFAT, NTFS, JFS, ReiserFS, NILFS2,
# HFS+, UDF, ISO 9660, SquashFS, EROFS.
_LOCAL = frozenset(
    {0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994, 0x858458F6, 0x794C7630, 0xF15F, 0x2FC12FC1, 0xCA451A4E}
    | {0x4D44, 0x2011BAB0, 0x5346544E, 0x7366746E, 0x3153464A, 0x52654973, 0x3434, 0x482B, 0x15013346, 0x9660}
    | {0x73717368, 0xE0F5E1E2}
)

_OPERATIONS = (
    (IN_CREATE, Operation.CREATE),
    (IN_MODIFY, Operation.MODIFY),
    (IN_ATTRIB | IN_MOVE_SELF, Operation.ATTRIB),
    (IN_CLOSE_WRITE, Operation.CLOSE_WRITE),
    (IN_MOVED_FROM | IN_MOVED_TO, Operation.MOVED),
    (IN_DELETE, Operation.DELETE),
)
# After these, a name leads elsewhere.
_CHANGES_NAME = IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE


class LocalFileSystems(FileSystems):
    """The file systems of which inotify tells every change, see `FileSystems`.

    Args:
        source: the absolute path of the source.
        own: st_dev of the mount itself, which may lie below the source, as (major, minor).
    """

    def __init__(self, source: str, own: tuple[int, int]) -> None:
        super().__init__(-1, source, own)
        self._devices: set[int] = set()

    def devices(self) -> frozenset[int]:
        """Return the devices that are heard, as in `Attributes.device`."""
        return frozenset(self._devices)

    def _mark(self, path: str, fd: int) -> None:
        if syscalls.file_system(fd).type not in _LOCAL:
            raise CannotHear("the kernel does not report all changes of its file system")
        self._devices.add(syscalls.fstatx(fd).device)


class _Parent(NamedTuple):
    """The directory of an event: its nodeid, device and st_ino."""

    nodeid: int
    device: int
    number: int


class InotifyQueue:
    """The events of the watches; see `llloop.watch.process.Queue`.

    Args:
        watches: the watches.
        table: the inode table.
        source: the absolute path of the source.
        own: st_dev of the mount itself, as (major, minor).

    Raises:
        CannotHear: the file system of the source cannot be heard.
    """

    method = Method.INOTIFY

    def __init__(self, watches: Watches, table: Table, source: str, own: tuple[int, int]) -> None:
        self.fd = watches.fd
        self.file_systems = LocalFileSystems(source, own)
        self.file_systems.add_source()
        self._watches = watches
        self._table = table
        self._data = b""

    def read(self) -> int:
        """Read events; return how many bytes, 0 if there are none."""
        try:
            self._data = os.read(self.fd, _BUFFER)
        except BlockingIOError:
            self._data = b""
        return len(self._data)

    def batch(self) -> Batch:
        """Return the events that were read."""
        events: list[Event] = []
        ignored = position = 0
        overflow = False
        data, watches = self._data, self._watches
        head = inotify.EVENT
        while position < len(data):
            number, mask, _, length = head.unpack_from(data, position)
            position += head.size
            name = data[position : position + length].rstrip(b"\0")
            position += length
            if mask & IN_Q_OVERFLOW:
                overflow = True
            elif mask & IN_IGNORED:
                watches.ended(number)
            else:
                nodeid = watches.directory(number)
                parent = _Parent(nodeid, *self._table.identity(nodeid)) if nodeid else None
                if parent is not None and parent.number:
                    self._add(events, parent, mask, name)
                else:
                    ignored += 1
        return Batch(events, ignored, overflow)

    def _add(self, events: list[Event], parent: _Parent, mask: int, name: bytes) -> None:
        """Append what one event says, once for each inode that it can be about."""
        is_dir = bool(mask & IN_ISDIR) or not name
        if name:
            nodeids = self._watches.inodes(parent.nodeid, name, changed=bool(mask & _CHANGES_NAME))
            objects = [self._table.identity(nodeid) for nodeid in nodeids]
        else:
            objects = [(parent.device, parent.number)]
        objects = [one for one in objects if one[1]]
        for bits, operation in _OPERATIONS:
            if mask & bits:
                place = (parent.number, name) if name else (0, b"")
                # A move has two events, one for each directory.
                old, new = ((0, b""), place) if mask & IN_MOVED_TO else (place, (0, b""))
                first = next((number for device, number in objects if device == parent.device), 0)
                events.append(Event(operation, is_dir, parent.device, *old, *new, first, _NOBODY))
                events += [
                    Event(operation, is_dir, device, 0, b"", 0, b"", number, _NOBODY)
                    for device, number in objects
                    if (device, number) != (parent.device, first)
                ]

    def forget(self) -> None:
        """Forget to what names lead, because events were lost."""
        self._watches.forget_names()
