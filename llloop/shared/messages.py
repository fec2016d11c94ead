"""The messages between the front and its workers, in one place for both sides.

A message is one msgpack array in one packet of a pipe (pipe(7), O_DIRECT), at most `MAX_MESSAGE`
bytes long. Payloads never travel in a message: they lie in a slot of the arena, or go between
file and kernel without passing through here at all.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Any, NamedTuple

import msgpack

from llloop.linux.syscalls import Attributes

MAX_MESSAGE = 4096  # PIPE_BUF (pipe(7)): the longest packet that is written whole


class Operation(IntEnum):
    """What a worker is asked to do."""

    READ = 1
    WRITE = 2
    FSYNC = 3
    FLUSH = 4
    FALLOCATE = 5
    LSEEK = 6
    COPY_FILE_RANGE = 7
    SYNCFS = 8
    RELEASE = 9
    RESUME = 10
    PROBE = 11
    INVALIDATED = 12
    GETATTR = 13


# Flags of a request: what WRITE, FALLOCATE and COPY_FILE_RANGE have in common ...
KILL_PRIVILEGES = 1 << 0  # drop set-user-ID, set-group-ID and file capabilities: the caller lacks CAP_FSETID
APPEND = 1 << 1  # write at the end of the file, wherever that is
# ... what tells fdatasync from fsync ...
DATA_ONLY = 1 << 2
# ... and what READ and WRITE of a file opened with O_DIRECT say when they are not direct: the kernel writes a mapping
# back through any descriptor, and fcntl(F_SETFL) can take O_DIRECT off.
BUFFERED = 1 << 3
# A WRITE of cached data: nobody looks at how much of it was written, so all of it must be, or an error be told.
CACHED = 1 << 4
# A WRITE whose payload is not in the slot but in its pipe: see `llloop.shared.pipes`.
PIPED = 1 << 5
# What PROBE is to do beyond asking for attributes, which a cache may answer: ask the server.
SERVER = 1 << 6
# READ and WRITE of a file whose size says nothing: each is one system call, for another would get or be something else.
ONCE = 1 << 8
# The kernel is to drop pages of the inode: after a WRITE those of its range, before an LSEEK all of them. Dirty pages
# are written first.
INVALIDATE = 1 << 9
# What a worker writes to the front when it has done a PROBE: the request's number.
PROBED = Struct("=Q")


_ALL_BITS = (1 << 64) - 1

# Handle numbers of one front: more than can be opened in a lifetime, so that no two fronts of a mount share any.
HANDLES_PER_FRONT = 1 << 40


class Malformed(Exception):
    """A message that is not one of ours; the text says why."""


class Request(NamedTuple):
    """One request from the front to a worker.

    Attributes:
        operation: an `Operation`.
        unique: the kernel's number of the request, under which it is answered.
        slot: the slot lent with it.
        handle: the number of the open file.
        descriptor: the front's descriptor of that file, to pull.
        offset: a position in the file in bytes.
        length: a length in bytes.
        flags: the flags above.
        uid, gid: the file system ids of who writes, for quotas and reserved blocks.
        extra: COPY_FILE_RANGE: the source's handle, descriptor, offset, inode and identity; FALLOCATE: the mode; LSEEK:
            the whence and the inode; WRITE: the inode, with INVALIDATE or where the kernel has not asked to clear
            set-ID bits before; GETATTR: the inode and the reply; FLUSH: how
            many writes had failed when the file was opened; INVALIDATED: the number of the request for which pages
            were dropped; RELEASE: the handles to let go of; RESUME: the numbers of the requests that may still be the
            worker's; PROBE: the places to look at, each a front's descriptor, or -1 for the source, and a path from
            there.
        file: the identity of the file, see `identity_of`.
        nodeid: its inode.
    """

    operation: int
    unique: int
    slot: int
    handle: int
    descriptor: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    uid: int = 0
    gid: int = 0
    extra: tuple[Any, ...] = ()
    file: int = 0
    nodeid: int = 0


def identity_of(attributes: Attributes) -> int:
    """Return 64 bits that tell a file from others, whatever descriptor it is seen through; 0 stands for any."""
    return hash((attributes.ino, attributes.device, attributes.btime, attributes.btime_nsec)) & _ALL_BITS


_packer = msgpack.Packer(use_bin_type=True)
encode = _packer.pack


def decode(data: bytes) -> Request:
    """Return the request that *data* holds.

    Raises:
        Malformed: *data* is not a request. That its fields are numbers is left to their use, for this is the hot path.
    """
    fields = _unpack(data)
    if type(fields) is not tuple or not 5 <= len(fields) <= 13:
        raise Malformed("not a request")
    return Request._make(fields) if len(fields) == 13 else Request(*fields)


def decode_strictly(data: bytes) -> Request:
    """Return the request that *data* holds, every field of which is what it should be.

    Raises:
        Malformed: *data* is not a request.
    """
    request = decode(data)
    *numbers, extra, file, nodeid = request
    if type(extra) is not tuple:
        raise Malformed("a field is no list")
    if request.operation == Operation.PROBE:
        if not all(type(place) is tuple and [type(field) for field in place] == [int, bytes] for place in extra):
            raise Malformed("a field is no place")
        extra = ()
    elif request.operation == Operation.GETATTR:
        if [type(field) for field in extra] != [int, bytes]:
            raise Malformed("a field is no reply")
        extra = ()
    if not all(type(field) is int for field in (*numbers, *extra, file, nodeid)):
        raise Malformed("a field is no number")
    return request


def decode_wanted(data: bytes) -> tuple[int, int, int, int]:
    """Return what a worker asks the invalidator for: the request's number, the inode's, offset and length in bytes."""
    unique, nodeid, offset, length = _unpack(data)
    return unique, nodeid, offset, length


class Answer(NamedTuple):
    """A worker's answer to a front that waits for it (only where llfuse runs the loop).

    Attributes:
        unique: the number of the request.
        result: a count or an offset, or a negative errno.
    """

    unique: int
    result: int


def decode_answer(data: bytes) -> Answer:
    """Return the answer that *data* holds.

    Raises:
        Malformed: *data* is not an answer.
    """
    fields = _unpack(data)
    if not isinstance(fields, tuple) or len(fields) != 2 or not all(type(field) is int for field in fields):
        raise Malformed("not an answer")
    return Answer(*fields)


def _unpack(data: bytes) -> Any:
    try:
        return msgpack.unpackb(data, use_list=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise Malformed(str(error)) from None
