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

# struct fanotify_event_metadata: event_len, mask, pid; the first record: info_type, len, fsid, the first 12 bytes of
# the handle behind its length and type. An event without records is shorter; a buffer must have room behind it.
_EVENT = Struct("=I4xQ4xiBxHQ8xIII")
_METADATA_SIZE = 24
_RECORD = Struct("=BxHQIiIII")  # info_type, len, fsid, handle_bytes, handle_type, the first 12 bytes
_HANDLE_OFFSET = 20  # in a record
_WORDS = Struct("=20xIII")  # the first 12 bytes of a record's handle
SLACK = _EVENT.size

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
    event, words, rename = _EVENT.unpack_from, _WORDS.unpack_from, FAN_RENAME
    after_generation, first_32 = Layout.AFTER_GENERATION, Layout.FIRST_32
    while position < length:
        size, mask, pid, _, record, fsid, first, second, third = event(data, position)
        file_system = file_systems.get(fsid)
        if file_system is not None:
            layout = file_system.layout  # `Layout.number`, inlined: most events go no further
            if layout is after_generation:
                number = second | third << 32
            else:
                number = first if layout is first_32 else first | second << 32
            if known[number & NUMBER_MASK] or mask & rename:
                _add(events, data, position, size, mask, pid, file_system, known)
            else:
                following = _METADATA_SIZE + record
                if following < size and known[layout.number(*words(data, position + following)) & NUMBER_MASK]:
                    _add(events, data, position, size, mask, pid, file_system, known)
                else:
                    ignored += 1
        elif mask & fanotify.FAN_Q_OVERFLOW:
            overflow = True
        else:
            ignored += 1
        position += size
    return Batch(events, ignored, overflow)


def _add(
    events: list[Event],
    data: bytearray | memoryview,
    start: int,
    size: int,
    mask: int,
    pid: int,
    file_system: FileSystem,
    known: memoryview,
) -> None:
    """Append the operations of one event, if the kernel may know one of its inodes."""
    directory = new_directory = number = 0
    name = new_name = b""
    position = start + _METADATA_SIZE
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
