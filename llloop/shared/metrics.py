"""The counters of a mount, in shared memory.

Each process has its own counters, which no other process writes. So no lock is needed, and counting costs a few
stores. The supervisor creates the memory before the first fork. It survives the front and the workers, and the
successor of a dead process continues its counters. Any process may read at any time; a sum may then miss the requests
that are being counted.
"""

from __future__ import annotations

import errno
import mmap
from enum import IntEnum
from itertools import zip_longest
from typing import NamedTuple

from llloop.linux.fuse import Opcode

# The cells of one operation. The first ones are the histogram: bucket 0 counts latencies below 1 us, bucket b those
# from 2**(b-1) to below 2**b us. Every latency that fits into 64 bits of nanoseconds has a bucket.
ROW_SIZE = 64
BUCKETS = 60
ERRORS, BYTES, NANOSECONDS = range(BUCKETS + 1, ROW_SIZE)
# Requests with an unknown opcode count as operation 0.
OPERATIONS = max(Opcode) + 1
UNKNOWN = "UNKNOWN"
# Each errno of <asm-generic/errno.h> has its own counter. Larger ones, which are internal to the kernel but returned
# by some file systems, count as number 0.
ERRNOS = max(errno.errorcode) + 1
OTHER = "OTHER"

# Errnos that describe a normal state, such as a missing file, or an invalid call of a program. Every local file system
# returns them in everyday use, so they do not count as errors. ESTALE is among them: with it, llloop tells the kernel
# that the source has changed, and the kernel looks up the name again.
EXPECTED_ERRNOS = frozenset(
    errno.errorcode[number]
    for number in (
        *(errno.ENOENT, errno.ENODATA, errno.ERANGE, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR),
        *(errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP, errno.EXDEV, errno.EMLINK),
        *(errno.E2BIG, errno.EFBIG, errno.ESPIPE, errno.ENXIO, errno.EBUSY, errno.ETXTBSY, errno.EAGAIN, errno.EINTR),
        *(errno.EDEADLK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.ESTALE),
    )
)


# For so long after a number of requests in close succession, idle CPUs should be awake, in nanoseconds.
AWAKE = 8_000_000
# A time that does not come.
NEVER = (1 << 64) - 1


def own_cell() -> memoryview:
    """Return a cell that belongs to no mount, for objects that are used outside a mount."""
    return memoryview(bytearray(8)).cast("Q")


class Gauge(IntEnum):
    """The front's gauges and counters of opens.

    INODES and HANDLES are current numbers. The others count opens of files since the start of the mount, by what
    happens to the file's cached pages in the kernel: KEPT, DROPPED, BYPASSED (`--cache never`: the kernel caches
    nothing), PASSED_THROUGH (the kernel does the I/O itself). AWAKE_UNTIL and HALT_UNTIL are times (monotonic clock,
    nanoseconds): until when idle CPUs should be awake, and until when the front need not ask for that. The supervisor
    writes HALT_UNTIL.
    """

    INODES = 0
    HANDLES = 1
    KEPT = 2
    DROPPED = 3
    BYPASSED = 4
    PASSED_THROUGH = 5
    AWAKE_UNTIL = 6
    HALT_UNTIL = 7


class Count(NamedTuple):
    """The counters of one operation in one process since the start of the mount.

    Attributes:
        requests: the number of finished requests.
        errors: how many of them were answered with an errno that is not among `EXPECTED_ERRNOS`.
        bytes: the bytes of file data that were read, written or copied.
        nanoseconds: the sum of the latencies, measured from the moment when the front took the request.
        histogram: the number of latencies in each bucket.
        errnos: the number of answers with each errno, by its name.
    """

    requests: int
    errors: int
    bytes: int
    nanoseconds: int
    histogram: tuple[int, ...]
    errnos: dict[str, int]

    def plus(self, other: Count) -> Count:
        """Return the sum of both."""
        pairs = zip_longest(self.histogram, other.histogram, fillvalue=0)
        return Count(
            self.requests + other.requests,
            self.errors + other.errors,
            self.bytes + other.bytes,
            self.nanoseconds + other.nanoseconds,
            tuple(one + another for one, another in pairs),
            {name: self.errnos.get(name, 0) + other.errnos.get(name, 0) for name in {**self.errnos, **other.errnos}},
        )


class ProcessCounters:
    """The counters of one process: for each opcode a row of `ROW_SIZE` cells, then for each opcode a cell per errno.

    Args:
        cells: the shared memory, `CELLS` long; default: memory that nobody reads.

    Attributes:
        rows: the row of each operation, by opcode.
        errnos: the errno cells of each operation, by opcode.
    """

    CELLS = (ROW_SIZE + ERRNOS) * OPERATIONS
    __slots__ = ("errnos", "rows")

    def __init__(self, cells: memoryview | None = None) -> None:
        memory = memoryview(bytearray(8 * self.CELLS)).cast("Q") if cells is None else cells
        self.rows = [memory[ROW_SIZE * opcode : ROW_SIZE * (opcode + 1)] for opcode in range(OPERATIONS)]
        errnos = memory[ROW_SIZE * OPERATIONS :]
        self.errnos = [errnos[ERRNOS * opcode : ERRNOS * (opcode + 1)] for opcode in range(OPERATIONS)]

    def finished(self, opcode: int, nanoseconds: int) -> None:
        """Count a finished request of *opcode* with its latency."""
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
        """Return the counters by the operation's name, without operations that were never requested."""
        found = {}
        for opcode, row in enumerate(self.rows):
            cells = row.tolist()
            if any(cells):
                histogram = tuple(cells[:BUCKETS])
                # Read the errno cells only if there are errors: untouched memory occupies no pages.
                errnos = self._errnos(opcode) if cells[ERRORS] else {}
                errors = sum(count for name, count in errnos.items() if name not in EXPECTED_ERRNOS)
                found[name_of(opcode)] = Count(
                    sum(histogram), errors, cells[BYTES], cells[NANOSECONDS], trimmed(histogram), errnos
                )
        return found

    def _errnos(self, opcode: int) -> dict[str, int]:
        return {errno.errorcode.get(number, OTHER): count for number, count in enumerate(self.errnos[opcode]) if count}


class Metrics:
    """All counters of a mount.

    Args:
        workers: the number of workers.
        slots: the number of slots.

    Attributes:
        front: the front's counters.
        workers: each worker's counters, by shard.
        gauges: the front's cells, by `Gauge`.
        begun: for each slot, when the front took its request (monotonic clock, nanoseconds). The front writes it before
            it lends the slot.
    """

    def __init__(self, workers: int, slots: int) -> None:
        sheet = ProcessCounters.CELLS
        cells = memoryview(mmap.mmap(-1, 8 * (sheet * (workers + 1) + ROW_SIZE + slots))).cast("Q")
        self.front = ProcessCounters(cells[:sheet])
        self.workers = [
            ProcessCounters(cells[sheet * number : sheet * (number + 1)]) for number in range(1, workers + 1)
        ]
        rest = cells[sheet * (workers + 1) :]
        self.gauges = rest[:ROW_SIZE]
        self.begun = rest[ROW_SIZE:]

    def gauge(self, which: Gauge) -> memoryview:
        """Return a memoryview of one gauge, for writing."""
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
