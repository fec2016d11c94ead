"""The trace of a mount's requests: rings in shared memory, written by front and workers, read by `llloop trace`.

Nobody waits for a reader. A writer overwrites its oldest records, and a reader that is too slow counts what it has
missed. There is one ring for the front and one for each worker, so each has one writer and needs no lock. The
supervisor creates the memory before the first fork, so it survives each writer; its successor continues the ring.

A record is either a `Begun`, which the front writes before it serves a request, or an `Answered`, which the process
writes that has answered it. A reader pairs them by the request's `unique`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import suppress
from struct import Struct
from typing import Any, NamedTuple

import msgpack

from llloop.linux.fuse import FUSE_UNIQUE_RESEND

# The cells of the header: whether somebody reads, and whether the front writes. Then the cells of each ring.
_WANTED, _WRITING = 0, 1
_FIRST_RING = 8
# The cells of a ring: the end of the last record, the end of the record that is being written (positions that only
# grow), and how many `Begun` records it has had.
_END, _RESERVED, _COUNT = range(3)
_CELLS = 4
_FRONT_SIZE = 1 << 20  # bytes
_WORKER_SIZE = 1 << 18

_LENGTH = Struct("=I")
_F_SEAL_FUTURE_WRITE = 0x10  # <linux/fcntl.h>, Linux 5.1
# A record is shorter than this: two paths and a name.
MAX_RECORD = 16 * 1024


class Begun(NamedTuple):
    """A request that the front begins to serve.

    Attributes:
        number: the number of this record, counted from 1, so that a reader notices that it has missed some.
        unique: the request's `unique`.
        taken: when the front received it (monotonic clock, nanoseconds).
        opcode: its opcode.
        pid: the calling process, 0 if it is outside of the server's PID namespace.
        uid: the user, or 2^32 - 1 if the request does not contain it.
        program: the name of the calling thread.
        path: the path in the mount.
        target: the second path of a request with two, else b"".
    """

    number: int
    unique: int
    taken: int
    opcode: int
    pid: int
    uid: int
    program: bytes
    path: bytes
    target: bytes


class Answered(NamedTuple):
    """An answer that the kernel has accepted.

    Attributes:
        unique: the request's `unique`.
        error: an errno, or 0.
        size: the number of bytes after the header of the answer.
        value: the first eight of these bytes as a number, or 0.
        time: when it was sent (monotonic clock, nanoseconds).
    """

    unique: int
    error: int
    size: int
    value: int
    time: int


class Ring:
    """The ring of one writer.

    Args:
        cells: its cells in the header.
        data: its memory.
    """

    def __init__(self, cells: memoryview, data: memoryview) -> None:
        self._cells = cells
        self._data = data
        self._size = len(data)

    def begun(self, unique: int, *fields: object) -> None:
        """Append a `Begun`; for the arguments see there."""
        number = self._cells[_COUNT] + 1
        self._append(msgpack.packb((number, unique & ~FUSE_UNIQUE_RESEND, *fields)))
        self._cells[_COUNT] = number

    def answered(self, unique: int, error: int, size: int, value: int, time: int) -> None:
        """Append an `Answered`; for the arguments see there."""
        self._append(msgpack.packb((unique & ~FUSE_UNIQUE_RESEND, error, size, value, time)))

    def _append(self, body: bytes) -> None:
        record = _LENGTH.pack(len(body)) + body
        if len(record) > MAX_RECORD:
            return
        cells, data = self._cells, self._data
        start = cells[_END]
        cells[_RESERVED] = start + len(record)
        place = start % self._size
        in_place = min(len(record), self._size - place)
        data[place : place + in_place] = record[:in_place]
        data[: len(record) - in_place] = record[in_place:]
        cells[_END] = start + len(record)


class _Follower:
    """A reader's place in a ring; for the arguments see `Ring`.

    Attributes:
        overrun: whether records were overwritten before they were read.
        count: how many `Begun` records the ring had had at the last call, or a few less.
    """

    def __init__(self, cells: memoryview, data: memoryview) -> None:
        self._cells = cells
        self._data = data
        self._place = cells[_END]
        self.overrun = False
        self.count = cells[_COUNT]

    def read(self) -> list[bytes]:
        """Return the records since the last call. If some were overwritten, return none and set `overrun`."""
        cells, data, size = self._cells, self._data, len(self._data)
        self.count = cells[_COUNT]  # before the end, so that it counts nothing that comes after the end
        start, end = self._place, cells[_END]
        self._place = end
        if not 0 <= end - start <= size:
            self.overrun = True
            return []
        place = start % size
        found = bytes(data[place : place + end - start])
        found += bytes(data[: end - start - len(found)])
        if cells[_RESERVED] > start + size:
            self.overrun = True
            return []
        records, position = [], 0
        while position < len(found):
            (length,) = _LENGTH.unpack_from(found, position)
            records.append(found[position + _LENGTH.size : position + _LENGTH.size + length])
            position += _LENGTH.size + length
        return records


def _layout(shards: int) -> tuple[int, list[tuple[int, int]], int]:
    """Return the size of the header, the start and size of each ring, and the size of everything, in bytes."""
    header = 8 * (_FIRST_RING + _CELLS * (shards + 1))
    header = -(-header // mmap.PAGESIZE) * mmap.PAGESIZE
    workers = header + _FRONT_SIZE
    places = [(header, _FRONT_SIZE), *((workers + shard * _WORKER_SIZE, _WORKER_SIZE) for shard in range(shards))]
    return header, places, workers + shards * _WORKER_SIZE


class Trace:
    """The memory, as the supervisor creates it. Pages that nobody writes to occupy no memory.

    Args:
        shards: the number of workers.

    Attributes:
        descriptor: the descriptor of the memory; a reader that gets it cannot write.

    Raises:
        OSError: there are no free descriptors.
    """

    def __init__(self, shards: int) -> None:
        header, places, size = _layout(shards)
        self.descriptor = os.memfd_create("llloop-trace", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, size)
            self._memory = mmap.mmap(self.descriptor, size)
            # A reader need not trust the server: the memory does not shrink below its mapping.
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            with suppress(OSError):  # before Linux 5.1
                fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._view = memoryview(self._memory)
        self._cells = self._view[:header].cast("Q")
        self._places = places

    def close(self) -> None:
        """Give the memory and its descriptors back."""
        self._cells.release()
        self._view.release()
        self._memory.close()
        os.close(self.descriptor)

    @property
    def wanted(self) -> bool:
        """Whether somebody reads the trace."""
        return bool(self._cells[_WANTED])

    @wanted.setter
    def wanted(self, value: bool) -> None:
        self._cells[_WANTED] = value

    def note_writing(self, value: bool) -> None:
        """Note whether the front writes its requests into the trace."""
        self._cells[_WRITING] = value

    def front(self) -> Ring:
        """Return the ring of the front."""
        return self._ring(0)

    def worker(self, shard: int) -> Ring:
        """Return the ring of the worker of *shard*."""
        return self._ring(shard + 1)

    def _ring(self, number: int) -> Ring:
        start, size = self._places[number]
        return Ring(_ring_cells(self._cells, number), self._view[start : start + size])


def _ring_cells(cells: memoryview, number: int) -> memoryview:
    first = _FIRST_RING + _CELLS * number
    return cells[first : first + _CELLS]


class TraceReader:
    """Reads the records that are written from now on.

    Args:
        descriptor: the descriptor of the memory.
        shards: the number of workers.

    Attributes:
        missed: how many requests this reader was too slow for.

    Raises:
        OSError: the memory cannot be mapped.
        ValueError: the descriptor is not that of a trace.
    """

    def __init__(self, descriptor: int, shards: int) -> None:
        header, places, size = _layout(shards)
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK or os.fstat(descriptor).st_size < size:
            raise ValueError("this is no trace")
        view = memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ))
        self._cells = view[:header].cast("Q")
        self._rings = [
            _Follower(_ring_cells(self._cells, number), view[start : start + length])
            for number, (start, length) in enumerate(places)
        ]
        self._last = self._rings[0].count
        self._open: dict[int, Begun] = {}
        self.missed = 0

    @property
    def is_written(self) -> bool:
        """Whether the front writes its requests into the trace."""
        return bool(self._cells[_WRITING])

    def read(self) -> list[tuple[Begun, Answered]]:
        """Return the requests that were answered since the last call, in the order of the answers.

        Raises:
            ValueError: the memory contains invalid records.
        """
        # The front comes last: what a worker has answered, the front has begun before.
        *of_workers, of_front = [ring.read() for ring in reversed(self._rings)]
        found = self._pair(of_front)
        front = self._rings[0]
        if front.overrun:
            self.missed += max(0, front.count - self._last)
            self._last = max(self._last, front.count)
        if any(ring.overrun for ring in self._rings):
            self.missed += len(self._open)  # their answers may be among what is lost
            self._open.clear()
        for ring in self._rings:
            ring.overrun = False
        for records in of_workers:
            found += self._pair(records)
        return sorted(found, key=lambda pair: pair[1].time)

    def _pair(self, records: list[bytes]) -> list[tuple[Begun, Answered]]:
        found = []
        for record in records:
            fields = _fields(record)
            if len(fields) == len(Begun._fields):
                self._begin(Begun._make(fields))
            else:
                answered = Answered._make(fields)
                begun = self._open.pop(answered.unique, None)
                if begun is not None:  # otherwise it was begun before this reader came
                    found.append((begun, answered))
        return found

    def _begin(self, begun: Begun) -> None:
        self.missed += max(0, begun.number - self._last - 1)
        self._last = begun.number
        self._open[begun.unique] = begun

    def unanswered(self) -> list[Begun]:
        """Return the requests that have no answer yet, the oldest first."""
        return sorted(self._open.values(), key=lambda begun: begun.taken)


_NUMBERS = {len(Begun._fields): 6, len(Answered._fields): 5}


def _fields(record: bytes) -> tuple[Any, ...]:
    """Return the fields of a record.

    Raises:
        ValueError: it is invalid.
    """
    try:
        fields: Any = msgpack.unpackb(record, use_list=False)
    except msgpack.UnpackException as error:
        raise ValueError(str(error)) from None
    count = _NUMBERS.get(len(fields)) if isinstance(fields, tuple) else None
    if count is None or not all(isinstance(one, int if place < count else bytes) for place, one in enumerate(fields)):
        raise ValueError("a record is invalid")
    return tuple(fields)
