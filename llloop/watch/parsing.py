"""Reading what fanotify(7) reports. What is outside of the source, or unknown to the kernel, must cost little.

An event holds the file handles of its directory and its object. A handle contains the inode number, at a place that
depends on the file system. So neither a system call nor a table of handles is needed to know which inode is meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from struct import Struct
from typing import NamedTuple

from llloop.linux import fanotify
from llloop.linux.fanotify import FAN_ATTRIB, FAN_CLOSE_WRITE, FAN_CREATE, FAN_DELETE, FAN_MODIFY, FAN_ONDIR, FAN_RENAME
from llloop.shared.watch_state import NUMBER_MASK
from llloop.watch.events import Event, Operation

# What is asked for.
EVENTS = FAN_CREATE | FAN_DELETE | FAN_RENAME | FAN_MODIFY | FAN_ATTRIB | FAN_CLOSE_WRITE | FAN_ONDIR

_METADATA = Struct("=I4xQ4xi")  # struct fanotify_event_metadata: event_len, mask, pid; then the records
_RECORD = Struct("=BxHQIiIII")  # info_type, len, fsid, handle_bytes, handle_type, the first 12 bytes of the handle
_HANDLE_OFFSET = 20  # in a record

_ORDER = (
    (FAN_CREATE, Operation.CREATE),
    (FAN_MODIFY, Operation.MODIFY),
    (FAN_ATTRIB, Operation.ATTRIB),
    (FAN_CLOSE_WRITE, Operation.CLOSE_WRITE),
    (FAN_RENAME, Operation.MOVED),
    (FAN_DELETE, Operation.DELETE),
)


class Layout(Enum):
    """Where a handle contains the inode number."""

    FIRST_32 = "32 bits"  # FILEID_INO32_GEN: ext4, XFS with small numbers, F2FS and others
    FIRST_64 = "64 bits"  # XFS, Btrfs (objectid)
    AFTER_GENERATION = "64 bits after the generation"  # tmpfs

    def number(self, first: int, second: int, third: int) -> int:
        """Return the inode number from the first three words of a handle."""
        if self is Layout.FIRST_32:
            return first
        return first | second << 32 if self is Layout.FIRST_64 else second | third << 32


class _Glance(NamedTuple):
    """What tells whether the kernel may know the inodes of an event. Most events go no further.

    Only the lower half of a number is looked at, because `NUMBER_MASK` has no more bits.

    Attributes:
        event: event_len; of the first record info_type, len, fsid, and the inode number.
        second: the inode number of the second record.
    """

    event: Struct
    second: Struct


_AT_START = _Glance(Struct("=I20xBxHQ8xI"), Struct("=20xI"))
_AFTER_GENERATION = _Glance(Struct("=I20xBxHQ12xI"), Struct("=24xI"))
_GLANCES = {
    Layout.FIRST_32: _AT_START,
    Layout.FIRST_64: _AT_START,
    Layout.AFTER_GENERATION: _AFTER_GENERATION,
}
# An event without records is shorter than what is unpacked, so a buffer must have room behind it.
SLACK = _METADATA.size + _RECORD.size


# The layout by type and length of a handle: include/linux/exportfs.h, mm/shmem.c, fs/xfs/xfs_export.h,
# fs/btrfs/export.h.
_LAYOUTS = {
    (0x01, 8): Layout.FIRST_32,
    (0x01, 12): Layout.AFTER_GENERATION,
    (0x81, 12): Layout.FIRST_64,
    (0x4D, 20): Layout.FIRST_64,
}


def layout_of(kind: int, handle: bytes, number: int) -> Layout | None:
    """Return the layout of a file system's handles, or None if it is unknown.

    Args:
        kind: the type of a handle.
        handle: its bytes.
        number: the inode number of the file that it belongs to.
    """
    layout = _LAYOUTS.get((kind, len(handle)))
    if layout is None:
        return None
    words = Struct("=III").unpack_from(handle + bytes(12))
    return layout if layout.number(*words) == number else None


class FileSystem(NamedTuple):
    """A file system that is heard.

    Attributes:
        device: st_dev, as in `llloop.linux.syscalls.Attributes`.
        layout: where its handles contain the inode number.
    """

    device: int
    layout: Layout


class Batch(NamedTuple):
    """What one read from the group has brought.

    Attributes:
        events: the events of inodes that the kernel may know, in their order.
        ignored: how many others there were.
        overflow: whether events were lost.
    """

    events: list[Event]
    ignored: int
    overflow: bool


def parse(
    data: bytearray | memoryview, length: int, file_systems: Mapping[int, FileSystem], known: memoryview
) -> Batch:
    """Return the events in a buffer.

    Args:
        data: the buffer, with `SLACK` bytes behind *length*.
        length: the number of bytes that read(2) has returned.
        file_systems: the file systems that are heard, by f_fsid.
        known: for each inode number (`NUMBER_MASK`) whether the kernel knows such an inode.
    """
    events: list[Event] = []
    ignored = position = 0
    overflow = False
    event, second = _AT_START
    unpack, unpack_second = event.unpack_from, second.unpack_from
    current = -1  # no f_fsid
    mask, renamed, records = NUMBER_MASK, fanotify.INFO_OLD_DFID_NAME, _METADATA.size
    while position < length:
        size, kind, record, fsid, number = unpack(data, position)
        if fsid != current:
            found = file_systems.get(fsid)
            if found is None:
                if _METADATA.unpack_from(data, position)[1] & fanotify.FAN_Q_OVERFLOW:
                    overflow = True
                else:
                    ignored += 1
                position += size
                continue
            current = fsid
            event, second = _GLANCES[found.layout]
            unpack, unpack_second = event.unpack_from, second.unpack_from
            continue
        # If there is no second record, this looks at other bytes. A rename has three. `_add` looks at all of them.
        if known[number & mask] or kind >= renamed or known[unpack_second(data, position + records + record)[0] & mask]:
            _add(events, data, position, size, file_systems[fsid], known)
        else:
            ignored += 1
        position += size
    return Batch(events, ignored, overflow)


def _add(
    events: list[Event],
    data: bytearray | memoryview,
    start: int,
    size: int,
    file_system: FileSystem,
    known: memoryview,
) -> None:
    """Append the operations of one event, if the kernel may know one of its inodes."""
    _, mask, pid = _METADATA.unpack_from(data, start)
    directory = new_directory = number = 0
    name = new_name = b""
    position = start + _METADATA.size
    while position < start + size:
        kind, length, _, handle_bytes, _, *words = _RECORD.unpack_from(data, position)
        found = file_system.layout.number(*words)
        text = bytes(data[position + _HANDLE_OFFSET + handle_bytes : position + length]).partition(b"\0")[0]
        if kind in (fanotify.INFO_DFID_NAME, fanotify.INFO_OLD_DFID_NAME, fanotify.INFO_DFID):
            directory, name = found, text
        elif kind == fanotify.INFO_NEW_DFID_NAME:
            new_directory, new_name = found, text
        elif kind == fanotify.INFO_FID:
            number = found
        position += length
    if name == b".":  # the event is about the directory itself
        number, directory, name = directory, 0, b""
    if not any(one and known[one & NUMBER_MASK] for one in (directory, new_directory, number)):
        return
    is_dir = bool(mask & FAN_ONDIR)
    for bit, operation in _ORDER:
        if mask & bit:
            moved = (new_directory, new_name) if operation is Operation.MOVED else (0, b"")
            events.append(Event(operation, is_dir, file_system.device, directory, name, *moved, number, pid))
