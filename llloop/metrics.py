"""What a mount has done and holds, counted in shared memory.

Every process writes a sheet of its own and nobody else does, so nothing is locked, and counting costs a few
stores. The memory is made before the first fork: it outlives the front and the workers, and whoever
takes the place of a dead one goes on with its sheet. Anybody may read at any time; a sum read while it is being
counted may be off by the requests of that moment.
"""

from __future__ import annotations

import mmap
from enum import IntEnum
from itertools import zip_longest
from typing import NamedTuple

from .wire import Opcode

# Cells of one operation: first the histogram, whose bucket b counts latencies of which the whole microseconds have b
# binary digits: bucket 0 less than 1 us, bucket b from 2**(b-1) to less than 2**b us. No latency that fits 64 bits of
# nanoseconds has more digits than there are buckets, so nobody has to check.
ROW = 64
BUCKETS = 60
ERRORS, BYTES, NANOSECONDS = range(BUCKETS + 1, ROW)
# Requests with opcodes that are not FUSE's count as operation 0.
OPERATIONS = max(Opcode) + 1
UNKNOWN = "UNKNOWN"


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
        errors: how many of these were answered with an errno.
        bytes: of file data read, written or copied.
        nanoseconds: the sum of the latencies, from the moment the front took a request.
        histogram: how many latencies fell into each bucket.
    """

    requests: int
    errors: int
    bytes: int
    nanoseconds: int
    histogram: tuple[int, ...]

    def plus(self, other: Count) -> Count:
        """Return both together."""
        pairs = zip_longest(self.histogram, other.histogram, fillvalue=0)
        return Count(
            self.requests + other.requests,
            self.errors + other.errors,
            self.bytes + other.bytes,
            self.nanoseconds + other.nanoseconds,
            tuple(one + another for one, another in pairs),
        )


class Sheet:
    """One process's counters, a row of `ROW` cells for each opcode.

    Args:
        cells: the memory; some of its own if it is not given, for what nobody counts.

    Attributes:
        rows: the cells of each operation, by opcode.
    """

    __slots__ = ("rows",)

    def __init__(self, cells: memoryview | None = None) -> None:
        memory = memoryview(bytearray(8 * ROW * OPERATIONS)).cast("Q") if cells is None else cells
        self.rows = [memory[ROW * opcode : ROW * (opcode + 1)] for opcode in range(OPERATIONS)]

    def finished(self, opcode: int, nanoseconds: int) -> None:
        """Count a request of *opcode* that took that long."""
        row = self.rows[opcode]
        row[NANOSECONDS] += nanoseconds
        row[(nanoseconds // 1000).bit_length()] += 1

    def add(self, opcode: int, kind: int, amount: int = 1) -> None:
        """Add to `ERRORS` or `BYTES` of *opcode*."""
        self.rows[opcode][kind] += amount

    def snapshot(self) -> dict[str, Count]:
        """Return what has been counted, by the operation's name; operations that never came are left out."""
        found = {}
        for opcode, row in enumerate(self.rows):
            cells = row.tolist()
            if any(cells):
                histogram = tuple(cells[:BUCKETS])
                found[name_of(opcode)] = Count(
                    sum(histogram), cells[ERRORS], cells[BYTES], cells[NANOSECONDS], trimmed(histogram)
                )
        return found


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
        sheet = ROW * OPERATIONS
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
