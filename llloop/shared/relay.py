"""What the event relay shares with the watch process and with the front. The relay is `llloop.watch.relay`.

The watch process writes a `RelayEvent` for each change in the source into a pipe. The relay makes the system call on
the mount that makes the same event there. For the time of this call, `RelayState` tells the front how to answer the
relay's requests.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import IntEnum
from typing import NamedTuple

import msgpack

from llloop.linux import fuse

# The file system uid and gid of the relay. No user has this uid, and only root can take it (setfsuid(2)). No front of a
# mount with a relay does an operation for this uid.
RELAY_UID = 0xFFFFFFF0

# The relay looks up this name in the root to learn the generation and the name of an inode.
INODE_QUESTION = b".llloop inode"

# Nodeids from here on are of phantoms: inodes that only the relay's requests see.
_PHANTOMS = 1 << 63

_PIPE_SIZE = 1 << 20
_CHUNK = 1 << 12  # so that the relay looks often whether the mount is still there


class Kind(IntEnum):
    """What happened to a name or its file."""

    CREATE = 1
    DELETE = 2
    RENAME = 3
    MODIFY = 4
    ATTRIB = 5
    CLOSE_WRITE = 6


class Place(NamedTuple):
    """A name in a directory.

    Attributes:
        parent: the nodeid of the directory.
        name: the name; empty for the directory itself.
    """

    parent: int
    name: bytes


class RelayEvent(NamedTuple):
    """A change in the source that the relay repeats on the mount.

    Attributes:
        kind: what happened.
        is_directory: whether the object is a directory.
        place: where it is, or was before a rename or removal.
        target: the nodeid of the object if the kernel knows it, else 0. Then those who watch the object itself get the
            event too.
        new: its new place after a rename.
        victim: the nodeid of what a rename has replaced, if the kernel knows it, else 0.
    """

    kind: Kind
    is_directory: bool
    place: Place
    target: int = 0
    new: Place | None = None
    victim: int = 0


class RelayPipe:
    """The pipe from the watch process to the relay.

    Attributes:
        reader, writer: its ends. The writer does not block.

    Args:
        ends: the ends of a new pipe.
    """

    def __init__(self, ends: tuple[int, int]) -> None:
        self.reader, self.writer = ends
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)
        with suppress(PermissionError):  # the limit of pipe pages is reached (pipe(7)); fewer events fit
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        self._unpacker = msgpack.Unpacker(raw=True, use_list=False)

    def tell(self, event: RelayEvent) -> bool:
        """Write an event; return False if the pipe is full, so that the event is dropped."""
        try:
            os.write(self.writer, msgpack.packb(event))  # shorter than PIPE_BUF, so all of it or nothing
        except BlockingIOError:
            return False
        return True

    def received(self) -> Iterator[RelayEvent]:
        """Return the events that wait in the pipe, up to a limit."""
        try:
            self._unpacker.feed(os.read(self.reader, _CHUNK))
        except BlockingIOError:
            return
        for kind, is_directory, place, target, new, victim in self._unpacker:
            yield RelayEvent(Kind(kind), is_directory, Place(*place), target, new and Place(*new), victim)

    def empty(self) -> None:
        """Drop everything in the pipe. The last reader may have taken a part of a message."""
        try:
            while len(os.read(self.reader, _CHUNK)) == _CHUNK:
                pass
        except BlockingIOError:
            pass


class Answer(NamedTuple):
    """How the front answers the relay's LOOKUP of a name.

    Attributes:
        place: the name.
        nodeid: the inode to which the name leads, 0 if it does not exist.
        attributes: ``struct fuse_attr`` of that inode as the kernel has it, for an inode that is gone in the source.
    """

    place: Place
    nodeid: int
    attributes: bytes = b""


_PID, _PHANTOM, _DIRECTORY, _COUNT, _ASKED, _GENERATION, _ANSWERED_PARENT, _ANSWERED_LENGTH = range(8)
_PARENT, _NODEID, _LOOKED_UP, _LENGTH = range(4)
_FIRST = 64  # the offset of the first answer, in bytes
_ANSWERED_NAME = 2048  # in bytes
_STEP = 512  # from one answer to the next
_ATTRIBUTES = 32  # the offset of the attributes in an answer
_NAME = _ATTRIBUTES + fuse.ATTR.size


class RelayState:
    """Shared memory in which the relay tells the front what its current system call is about.

    The relay writes it before the call. It waits for the call, so nothing changes while the front reads. The memory
    outlives both processes: a new front answers a request that is sent again as the dead one would have.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._cells = memoryview(self._memory).cast("Q")

    # For the relay

    def started(self) -> bool:
        """Note that this process is the relay; return whether there was one before."""
        is_successor = bool(self._cells[_PID])
        self._cells[_COUNT] = 0
        self._cells[_PID] = os.getpid()
        return is_successor

    def new_phantom(self) -> int:
        """Return the nodeid of a new phantom."""
        self._cells[_PHANTOM] += 1
        return self.phantom

    def begin(self, answers: Sequence[Answer], is_directory: bool) -> None:
        """Tell the front what the next system call is about.

        Args:
            answers: how to answer the LOOKUPs: of one name, or of the old and the new name of a rename. The inode of
                the first one is the target.
            is_directory: whether a phantom is a directory.
        """
        cells = self._cells
        cells[_COUNT] = 0
        cells[_DIRECTORY] = is_directory
        for index, (place, nodeid, attributes) in enumerate(answers):
            start = _FIRST + index * _STEP
            cells[start // 8 + _PARENT] = place.parent
            cells[start // 8 + _NODEID] = nodeid
            cells[start // 8 + _LOOKED_UP] = 0
            cells[start // 8 + _LENGTH] = len(place.name)
            self._memory[start + _ATTRIBUTES : start + _ATTRIBUTES + len(attributes)] = attributes
            self._memory[start + _NAME : start + _NAME + len(place.name)] = place.name
        cells[_COUNT] = len(answers)

    def ask(self, nodeid: int) -> None:
        """Ask the front about an inode. It answers at the next LOOKUP of `INODE_QUESTION`."""
        self._cells[_ASKED] = nodeid
        self._cells[_GENERATION] = 0

    @property
    def answered(self) -> tuple[int, Place] | None:
        """The generation of the inode (the lowest 32 bits) and its place; None if the front does not know the inode."""
        generation, parent, length = self._cells[_GENERATION : _ANSWERED_LENGTH + 1]
        if not generation:
            return None
        return generation & 0xFFFFFFFF, Place(parent, self._memory[_ANSWERED_NAME : _ANSWERED_NAME + length])

    def end(self) -> None:
        """Note that the system call is over."""
        self._cells[_COUNT] = 0

    # For the front

    @property
    def pid(self) -> int:
        """The process id of the relay."""
        return self._cells[_PID]

    @property
    def asked(self) -> int:
        """The nodeid of the inode about which the relay asks."""
        return self._cells[_ASKED]

    def answer(self, generation: int, place: Place) -> None:
        """Tell the relay the generation and the place of the inode."""
        cells = self._cells
        cells[_ANSWERED_PARENT] = place.parent
        cells[_ANSWERED_LENGTH] = len(place.name)
        self._memory[_ANSWERED_NAME : _ANSWERED_NAME + len(place.name)] = place.name
        cells[_GENERATION] = 1 << 32 | generation & 0xFFFFFFFF

    @property
    def phantom(self) -> int:
        """The nodeid of the last phantom."""
        return _PHANTOMS | self._cells[_PHANTOM]

    @property
    def is_directory(self) -> bool:
        """Whether the phantom is a directory."""
        return bool(self._cells[_DIRECTORY])

    @property
    def target(self) -> int:
        """The nodeid of the inode that the current system call is about, 0 if there is none."""
        return self._cells[_FIRST // 8 + _NODEID] if self._cells[_COUNT] else 0

    def find(self, parent: int, name: bytes) -> int | None:
        """Return the index of the answer for a name, None if the current system call is not about it."""
        for index in range(self._cells[_COUNT]):
            start = _FIRST + index * _STEP
            length = self._cells[start // 8 + _LENGTH]
            there = self._memory[start + _NAME : start + _NAME + length]
            if there == name and self._cells[start // 8 + _PARENT] == parent:
                return index
        return None

    def look_up(self, index: int) -> tuple[int, bytes]:
        """Note that the kernel looks a name up; return the answer's nodeid and attributes."""
        start = _FIRST + index * _STEP
        self._cells[start // 8 + _LOOKED_UP] = 1
        return self._cells[start // 8 + _NODEID], self.attributes(index)

    def attributes(self, index: int) -> bytes:
        """Return the attributes of an answer's inode."""
        start = _FIRST + index * _STEP
        return self._memory[start + _ATTRIBUTES : start + _NAME]

    def looked_up(self, index: int) -> int | None:
        """Return the nodeid with which the LOOKUP of a name was answered, None if it was not looked up."""
        start = _FIRST + index * _STEP
        return self._cells[start // 8 + _NODEID] if self._cells[start // 8 + _LOOKED_UP] else None
