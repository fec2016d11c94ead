"""What a mount has done and holds, counted in shared memory.

Every process writes a sheet of its own and nobody else does, so nothing is locked, and counting costs a few
stores. The memory is made before the first fork: it outlives the front and the workers, and whoever
takes the place of a dead one goes on with its sheet. Anybody may read at any time; a sum read while it is being
counted may be off by the requests of that moment.
"""

from __future__ import annotations

import errno
import mmap
from enum import IntEnum
from itertools import zip_longest
from typing import NamedTuple

from llloop.linux.fuse import Opcode

# Cells of one operation: first the histogram, whose bucket b counts latencies of which the whole microseconds have b
# binary digits: bucket 0 less than 1 us, bucket b from 2**(b-1) to less than 2**b us. No latency that fits 64 bits of
# nanoseconds has more digits than there are buckets, so nobody has to check.
ROW = 64
BUCKETS = 60
ERRORS, BYTES, NANOSECONDS = range(BUCKETS + 1, ROW)
# Requests with opcodes that are not FUSE's count as operation 0.
OPERATIONS = max(Opcode) + 1
UNKNOWN = "UNKNOWN"
# Errnos are counted each by itself up to the largest of <asm-generic/errno.h>; larger ones, which the kernel keeps to
# itself but some file systems let out, as number 0.
ERRNOS = max(errno.errorcode) + 1
OTHER = "OTHER"

# Answers that say how things are, or that a program has asked for what cannot be. Every local file system gives them
# in everyday use, so they are no reason for an alarm. ESTALE is among them: by it llloop tells the kernel that the
# source has changed, and the kernel looks the name up again.
ORDINARY = frozenset(
    errno.errorcode[number]
    for number in (
        *(errno.ENOENT, errno.ENODATA, errno.ERANGE, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR),
        *(errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP, errno.EXDEV, errno.EMLINK),
        *(errno.E2BIG, errno.EFBIG, errno.ESPIPE, errno.ENXIO, errno.EBUSY, errno.ETXTBSY, errno.EAGAIN, errno.EINTR),
        *(errno.EDEADLK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.ESTALE),
    )
)


def own_cell() -> memoryview:
    """Return a cell that is no mount's, for what is used without one."""
    return memoryview(bytearray(8)).cast("Q")


class Gauge(IntEnum):
    """The front's cells beside its sheet.

    INODES, HANDLES: how many there are now.
    The others count opens of files since the mount began, by what becomes of the pages that the kernel has of the
    file: KEPT, DROPPED, BYPASSED (none are kept, by --cache never), PASSED_THROUGH (the kernel does the I/O itself).
    """

    INODES = 0
    HANDLES = 1
    KEPT = 2
    DROPPED = 3
    BYPASSED = 4
    PASSED_THROUGH = 5


class Count(NamedTuple):
    """What one process has done of one operation since the mount began.

    Attributes:
        requests: how many it has finished.
        errors: how many of these failed: were answered with an errno that is not among `ORDINARY`.
        bytes: of file data read, written or copied.
        nanoseconds: the sum of the latencies, from the moment the front took a request.
        histogram: how many latencies fell into each bucket.
        errnos: how many were answered with each errno, by its name.
    """

    requests: int
    errors: int
    bytes: int
    nanoseconds: int
    histogram: tuple[int, ...]
    errnos: dict[str, int]

    def plus(self, other: Count) -> Count:
        """Return both together."""
        pairs = zip_longest(self.histogram, other.histogram, fillvalue=0)
        return Count(
            self.requests + other.requests,
            self.errors + other.errors,
            self.bytes + other.bytes,
            self.nanoseconds + other.nanoseconds,
            tuple(one + another for one, another in pairs),
            {name: self.errnos.get(name, 0) + other.errnos.get(name, 0) for name in {**self.errnos, **other.errnos}},
        )


class Sheet:
    """One process's counters: `CELLS`, for each opcode a row of `ROW` cells, then a cell for each errno.

    Args:
        cells: the memory; some of its own if it is not given, for what nobody counts.

    Attributes:
        rows: the cells of each operation, by opcode.
    """

    CELLS = (ROW + ERRNOS) * OPERATIONS
    __slots__ = ("errnos", "rows")

    def __init__(self, cells: memoryview | None = None) -> None:
        memory = memoryview(bytearray(8 * self.CELLS)).cast("Q") if cells is None else cells
        self.rows = [memory[ROW * opcode : ROW * (opcode + 1)] for opcode in range(OPERATIONS)]
        errnos = memory[ROW * OPERATIONS :]
        self.errnos = [errnos[ERRNOS * opcode : ERRNOS * (opcode + 1)] for opcode in range(OPERATIONS)]

    def finished(self, opcode: int, nanoseconds: int) -> None:
        """Count a request of *opcode* that took that long."""
        row = self.rows[opcode]
        row[NANOSECONDS] += nanoseconds
        row[(nanoseconds // 1000).bit_length()] += 1

    def failed(self, opcode: int, number: int) -> None:
        """Count a request of *opcode* that was answered with errno *number*."""
        self.rows[opcode][ERRORS] += 1
        self.errnos[opcode][number if 0 < number < ERRNOS else 0] += 1

    def moved(self, opcode: int, count: int) -> None:
        """Count *count* bytes that a request of *opcode* moved."""
        self.rows[opcode][BYTES] += count

    def snapshot(self) -> dict[str, Count]:
        """Return what has been counted, by the operation's name; operations that never came are left out."""
        found = {}
        for opcode, row in enumerate(self.rows):
            cells = row.tolist()
            if any(cells):
                histogram = tuple(cells[:BUCKETS])
                # Looked at only where there is something: memory that nobody touches takes no room.
                errnos = self._errnos(opcode) if cells[ERRORS] else {}
                errors = sum(count for name, count in errnos.items() if name not in ORDINARY)
                found[name_of(opcode)] = Count(
                    sum(histogram), errors, cells[BYTES], cells[NANOSECONDS], trimmed(histogram), errnos
                )
        return found

    def _errnos(self, opcode: int) -> dict[str, int]:
        return {errno.errorcode.get(number, OTHER): count for number, count in enumerate(self.errnos[opcode]) if count}


class Metrics:
    """All counters of a mount.

    Args:
        workers: how many workers there are.
        slots: how many requests can be with them at a time.

    Attributes:
        front: the front's sheet.
        workers: the workers' sheets by shard.
        gauges: see `Gauge`; the front's.
        begun: when the request in each slot was taken (monotonic clock, nanoseconds); written by the front before it
            lends the slot.
    """

    def __init__(self, workers: int, slots: int) -> None:
        sheet = Sheet.CELLS
        cells = memoryview(mmap.mmap(-1, 8 * (sheet * (workers + 1) + ROW + slots))).cast("Q")
        self.front = Sheet(cells[:sheet])
        self.workers = [Sheet(cells[sheet * number : sheet * (number + 1)]) for number in range(1, workers + 1)]
        rest = cells[sheet * (workers + 1) :]
        self.gauges = rest[:ROW]
        self.begun = rest[ROW:]

    def gauge(self, which: Gauge) -> memoryview:
        """Return a view of one cell, for who writes it."""
        return self.gauges[which : which + 1]


def name_of(opcode: int) -> str:
    """Return the name of an operation, as in ``enum fuse_opcode``."""
    try:
        return Opcode(opcode).name
    except ValueError:
        return UNKNOWN


def trimmed(histogram: tuple[int, ...]) -> tuple[int, ...]:
    """Return *histogram* without the empty buckets at its end."""
    end = len(histogram)
    while end and not histogram[end - 1]:
        end -= 1
    return histogram[:end]
