"""The rings of the trace."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from llloop.linux.fuse import FUSE_UNIQUE_RESEND
from llloop.shared.trace import Trace, TraceReader


@pytest.fixture
def trace() -> Iterator[Trace]:
    one = Trace(2)
    yield one
    one.close()


def begin(trace: Trace, unique: int, path: bytes = b"/file") -> None:
    trace.front().begun(unique, 5, 1, 10, 0, b"program", path, b"")


def uniques(reader: TraceReader) -> list[int]:
    return [begun.unique for begun, _ in reader.read()]


def test_answers_of_all_processes_are_paired(trace: Trace) -> None:
    reader = TraceReader(trace.descriptor, 2)
    for unique in (1, 2, 3):
        begin(trace, unique)
    trace.worker(0).answered(2, 0, 4, 7, 102)
    trace.worker(1).answered(1 | FUSE_UNIQUE_RESEND, 5, 0, 0, 101)
    (first, failed), (second, done) = reader.read()
    assert (first.unique, first.path, failed.error) == (1, b"/file", 5)
    assert (second.unique, done.size, done.value) == (2, 4, 7)
    assert [begun.unique for begun in reader.unanswered()] == [3]
    trace.front().answered(3, 0, 0, 0, 103)
    assert uniques(reader) == [3]
    assert reader.missed == 0


def test_reader_begins_with_what_comes(trace: Trace) -> None:
    begin(trace, 1)
    reader = TraceReader(trace.descriptor, 2)
    trace.front().answered(1, 0, 0, 0, 1)
    begin(trace, 2)
    trace.front().answered(2, 0, 0, 0, 2)
    assert uniques(reader) == [2]
    assert reader.missed == 0


def test_slow_reader_counts_what_it_misses(trace: Trace) -> None:
    reader = TraceReader(trace.descriptor, 2)
    begin(trace, 1)
    assert uniques(reader) == []
    for unique in range(2, 1002):
        begin(trace, unique, b"/" + b"x" * 4000)
    assert uniques(reader) == []
    begin(trace, 1002)
    trace.front().answered(1002, 0, 0, 0, 1)
    assert uniques(reader) == [1002]
    assert reader.missed == 1001


def test_overwritten_answers_of_a_worker_count(trace: Trace) -> None:
    reader = TraceReader(trace.descriptor, 2)
    for unique in range(1, 5):
        begin(trace, unique)
    for _ in range(100_000):
        trace.worker(0).answered(1, 0, 0, 0, 1)
    assert uniques(reader) == []
    assert reader.missed == 4
    assert reader.unanswered() == []


def test_records_that_are_too_long_are_left_out(trace: Trace) -> None:
    reader = TraceReader(trace.descriptor, 2)
    begin(trace, 1, b"x" * 20_000)
    begin(trace, 2)
    trace.front().answered(2, 0, 0, 0, 1)
    assert uniques(reader) == [2]


def test_reading_while_it_is_written(trace: Trace) -> None:
    reader = TraceReader(trace.descriptor, 2)
    count = 30_000

    def write() -> None:
        ring = trace.front()
        for unique in range(1, count + 1):
            ring.begun(unique, 5, 1, 10, 0, b"program", b"/file", b"")
            ring.answered(unique, 0, 0, 0, unique)

    writer = threading.Thread(target=write)
    writer.start()
    seen: list[int] = []
    while writer.is_alive():
        seen += uniques(reader)
    writer.join()
    seen += uniques(reader)
    begin(trace, count + 1)
    seen += uniques(reader)
    assert seen == sorted(seen)
    assert len(seen) + reader.missed == count


def test_reader_cannot_write_or_shrink(trace: Trace) -> None:
    import mmap

    with pytest.raises(PermissionError):
        mmap.mmap(trace.descriptor, mmap.PAGESIZE)
    with pytest.raises(PermissionError):
        os.ftruncate(trace.descriptor, 0)


def test_other_descriptors_are_no_trace(trace: Trace) -> None:
    unsealed = os.memfd_create("other", os.MFD_CLOEXEC)
    reader, writer = os.pipe()
    try:
        for fd in (unsealed, reader):
            with pytest.raises((OSError, ValueError)):
                TraceReader(fd, 2)
        with pytest.raises(ValueError, match="no trace"):
            TraceReader(trace.descriptor, 3)
    finally:
        for fd in (unsealed, reader, writer):
            os.close(fd)


def test_invalid_records_are_refused(trace: Trace) -> None:
    reader = TraceReader(trace.descriptor, 2)
    trace.worker(0).answered(1, "text", 0, 0, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="invalid"):
        reader.read()
