"""The messages between the front and its workers.

A message is a msgpack array in one packet of a pipe (pipe(7), O_DIRECT), at most `MAX_MESSAGE` bytes long. Messages
contain no file data: the data of a WRITE is in a slot or in its pipe, and a worker sends the data of a READ directly
to the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from struct import Struct
from typing import Any, NamedTuple

import msgpack

from llloop.linux.syscalls import Attributes

MAX_MESSAGE = 4096  # PIPE_BUF (pipe(7)): the longest packet that is written atomically


class Operation(IntEnum):
    """What a request asks a worker to do."""

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
    TRACE = 14


# Those that change data of a file.
DATA_CHANGES = frozenset({Operation.WRITE, Operation.FALLOCATE, Operation.COPY_FILE_RANGE})

# Flags of a request.
# WRITE, FALLOCATE, COPY_FILE_RANGE: clear set-user-ID, set-group-ID and file capabilities; the caller lacks CAP_FSETID.
KILL_PRIVILEGES = 1 << 0
# The same: write at the end of the file, wherever that is.
APPEND = 1 << 1
# FSYNC: fdatasync(2) instead of fsync(2).
DATA_ONLY = 1 << 2
# READ, WRITE: do not use O_DIRECT, although the file was opened with it. The kernel writes mapped pages back through
# any open file, and fcntl(F_SETFL) can switch O_DIRECT off.
BUFFERED = 1 << 3
# WRITE of pages of the kernel's cache: write everything or return an error, because the kernel ignores a short count.
CACHED = 1 << 4
# WRITE: the data is in the slot's pipe instead of in the slot, see `llloop.shared.pipes`.
PIPED = 1 << 5
# PROBE: ask the server of a network file system, because a cache may answer a request for attributes.
ASK_SERVER = 1 << 6
# READ, WRITE of a file without a meaningful size (such as in proc(5)): make one system call only, because a second one
# would read other data, or write a separate message.
SINGLE_CALL = 1 << 8
# Make the kernel drop cached pages of the inode, after it has written dirty ones: after a WRITE the pages of its range,
# before an LSEEK all.
INVALIDATE = 1 << 9
# The message that a worker writes to the front after a PROBE: the request's `unique`.
PROBED = Struct("=Q")


_ALL_BITS = (1 << 64) - 1

# The number of file handles that one front can assign. No front opens so many, so no two fronts of a mount ever assign
# the same handle.
HANDLES_PER_FRONT = 1 << 40


class Malformed(Exception):
    """The data is not a valid message; the text says why."""


class Request(NamedTuple):
    """One request from the front to a worker.

    Attributes:
        operation: an `Operation`.
        unique: the request's `unique`, which its reply must contain.
        slot: the slot that is lent with the request.
        handle: the file handle.
        descriptor: the front's descriptor of that file, which the worker duplicates (pidfd_getfd(2)).
        offset: an offset in the file in bytes.
        length: a length in bytes.
        flags: the flags above.
        uid, gid: the file system ids of the writing user, for quotas and reserved blocks.
        extra: depends on the operation:

            * COPY_FILE_RANGE: the source's handle, descriptor, offset, inode and identity.
            * FALLOCATE: the mode.
            * LSEEK: the whence and the inode.
            * WRITE: the inode, if INVALIDATE is set, or if the kernel has not asked for set-ID bits to be cleared
              before.
            * GETATTR: the inode and the reply.
            * FLUSH: how many writes had failed when the file was opened.
            * INVALIDATED: the `unique` of the request for which the kernel dropped pages.
            * RELEASE: the handles to close.
            * TRACE: nothing; a reader of the trace has come, or the last one has left.
            * RESUME: the `unique` of each request that the worker may still have.
            * PROBE: the places to check, each a descriptor of the front, or -1 for the source, and a path from there.
        file: the identity of the file, see `identity_of`.
        nodeid: the file's inode.
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
    """Return 64 bits that identify a file, so that a worker can check that a descriptor is of the file it expects.

    A request with identity 0 means any file.
    """
    return hash((attributes.ino, attributes.device, attributes.btime, attributes.btime_nsec)) & _ALL_BITS


_packer = msgpack.Packer(use_bin_type=True)
encode: Callable[[object], bytes] = _packer.pack


def decode(data: bytes) -> Request:
    """Return the request in *data*, without checking the types of its fields, because this is the hot path.

    Raises:
        Malformed: *data* is not a request.
    """
    fields = _unpack(data)
    if type(fields) is not tuple or not 5 <= len(fields) <= 13:
        raise Malformed("not a request")
    return Request._make(fields) if len(fields) == 13 else Request(*fields)


def decode_strictly(data: bytes) -> Request:
    """Return the request in *data* after checking the type of every field.

    Raises:
        Malformed: *data* is not a request, or a field has the wrong type.
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


def decode_invalidation(data: bytes) -> tuple[int, int, int, int]:
    """Return a worker's order to the invalidator: `unique` of its request, inode, offset and length in bytes."""
    unique, nodeid, offset, length = _unpack(data)
    return unique, nodeid, offset, length


class Answer(NamedTuple):
    """A worker's answer to a front that waits for it (only with the plain loop, `--loop llfuse`).

    Attributes:
        unique: the request's `unique`.
        result: a count or an offset in bytes, or a negative errno.
    """

    unique: int
    result: int


def decode_answer(data: bytes) -> Answer:
    """Return the answer in *data*.

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
