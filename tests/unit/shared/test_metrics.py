"""Counters in shared memory: what is counted, and how it is read."""

from __future__ import annotations

import errno
import os
import signal
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from llloop.front.loop import Loop
from llloop.linux.fuse import Opcode
from llloop.shared.journal import Journal
from llloop.shared.metrics import (
    BUCKETS,
    BYTES,
    ERRNOS,
    ERRORS,
    EXPECTED_ERRNOS,
    NANOSECONDS,
    OPERATIONS,
    ROW_SIZE,
    Gauge,
    Metrics,
    ProcessCounters,
)
from tests.as_user import Child
from tests.unit.source import MYSELF, Source


def test_counters_count_requests_errors_bytes_and_latencies() -> None:
    sheet = ProcessCounters()
    for nanoseconds in (0, 999, 1_000, 1_999, 2_000, 1_000_000):
        sheet.finished(Opcode.READ, nanoseconds)
    sheet.moved(Opcode.READ, 2**40)
    sheet.failed(Opcode.READ, errno.EIO)
    (name, count), *others = sheet.snapshot().items()
    assert (name, others) == ("READ", [])
    assert count[:4] == (6, 1, 2**40, 1_005_998)
    # Less than 1 us: two; from 1 to 2: two; from 2 to 4: one; from 512 to 1024: one.
    assert count.histogram == (2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 1)
    assert count.errnos == {"EIO": 1}


def test_expected_errnos_do_not_count_as_errors() -> None:
    sheet = ProcessCounters()
    for number in errno.errorcode:
        sheet.failed(Opcode.GETXATTR, number)
    for number in (524, 0, -5, 1 << 40):  # ENOTSUPP, which the kernel should keep to itself, and what nobody means
        sheet.failed(Opcode.GETXATTR, number)
    (count,) = sheet.snapshot().values()
    assert count.errnos == {**dict.fromkeys(errno.errorcode.values(), 1), "OTHER": 4}
    assert count.errors == len(errno.errorcode) - len(EXPECTED_ERRNOS) + 4
    assert {"ENOENT", "ENODATA", "ERANGE", "EEXIST", "EACCES"} <= EXPECTED_ERRNOS
    assert (
        not {"EIO", "ENOSPC", "EDQUOT", "EROFS", "EMFILE", "ENFILE", "ENOMEM", "ETIMEDOUT", "ENOTCONN"}
        & EXPECTED_ERRNOS
    )


def test_every_latency_has_a_bucket() -> None:
    sheet = ProcessCounters()
    sheet.finished(Opcode.STATX, 2**63 - 1)
    assert sheet.snapshot()["STATX"].requests == 1
    assert sheet.rows[Opcode.STATX][ERRORS] == sheet.rows[Opcode.STATX][BYTES] == 0
    assert BUCKETS <= min(ERRORS, BYTES, NANOSECONDS) < ROW_SIZE


def test_cells_do_not_overlap() -> None:
    metrics = Metrics(3, 5)
    sheets = [metrics.front, *metrics.workers]
    rows = [row for sheet in sheets for row in (*sheet.rows, *sheet.errnos)]
    assert len(rows) == 8 * OPERATIONS
    for number, row in enumerate(rows):
        row[:] = memoryview(struct.pack(f"={len(row)}Q", *[number] * len(row))).cast("Q")
    for gauge in Gauge:
        metrics.gauge(gauge)[0] = 10_000 + gauge
    for slot in range(5):
        metrics.begun[slot] = 20_000 + slot
    assert [row.tolist() for row in rows] == [[number] * len(row) for number, row in enumerate(rows)]
    assert {len(row) for row in rows} == {ROW_SIZE, ERRNOS}
    assert [metrics.gauges[gauge] for gauge in Gauge] == [10_000 + gauge for gauge in Gauge]
    assert metrics.begun.tolist() == [20_000 + slot for slot in range(5)]


def test_plus_adds_counts() -> None:
    one, another = ProcessCounters(), ProcessCounters()
    one.finished(Opcode.READ, 1_500)
    another.finished(Opcode.READ, 9_000)
    one.failed(Opcode.READ, errno.ENOENT)
    another.failed(Opcode.READ, errno.ENOENT)
    another.failed(Opcode.READ, errno.EIO)
    both = one.snapshot()["READ"].plus(another.snapshot()["READ"])
    assert both == (2, 1, 0, 10_500, (0, 1, 0, 0, 1), {"ENOENT": 2, "EIO": 1})


def test_successor_continues_the_counters() -> None:
    metrics = Metrics(1, 1)

    def work(dies: bool) -> None:
        metrics.workers[0].finished(Opcode.WRITE, 5)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        work(dies=True)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    Child(work, False).result()
    assert metrics.workers[0].snapshot()["WRITE"].requests == 2


class Requests:
    """Replaces /dev/fuse: gives the loop one request after the other, then the unmount."""

    def __init__(self, source: Source, *requests: bytes) -> None:
        self.waiting = list(requests)
        self.slots = source.context.router.slots

    def readv(self, fd: int, buffers: list[memoryview]) -> int:
        if not self.waiting:
            raise OSError(errno.ENODEV, "unmounted")
        data = self.waiting.pop(0)
        buffers[0][: len(data)] = data
        return len(data)


def request(opcode: int, nodeid: int, payload: bytes, unique: int = 2) -> bytes:
    return struct.pack("=IIQQIIIHH", 40 + len(payload), opcode, unique, nodeid, 0, 0, 0, 0, 0) + payload


def run_loop(source: Source, device: int, monkeypatch: pytest.MonkeyPatch, *requests: bytes) -> None:
    """Has the loop do *requests*."""
    stand_in = SimpleNamespace(**{name: getattr(os, name) for name in ("write", "strerror")})
    stand_in.readv = Requests(source, *requests).readv
    monkeypatch.setattr("llloop.front.loop.os", stand_in)
    Loop(source.context, device, Journal(64)).run()


@pytest.fixture
def sheet(source: Source) -> ProcessCounters:
    return source.context.router.slots.metrics.front


def test_loop_counts_requests_of_the_front(
    source: Source, sheet: ProcessCounters, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source.path / "file").touch()
    lookup, missing = (request(Opcode.LOOKUP, 1, name) for name in (b"file\0", b"no directory/\0"))
    access = request(Opcode.ACCESS, 1, bytes(8))
    run_loop(source, device.fd, monkeypatch, lookup, lookup, missing, access)
    counts = sheet.snapshot()
    assert {name: count[:2] for name, count in counts.items()} == {"LOOKUP": (3, 0), "ACCESS": (1, 0)}
    assert counts["LOOKUP"].errnos == {"EINVAL": 1}
    assert 0 < counts["LOOKUP"].nanoseconds < 60_000_000_000
    assert source.context.router.slots.metrics.gauges[Gauge.INODES] == 2


def test_unknown_opcode_is_counted_as_unknown(
    source: Source, sheet: ProcessCounters, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = request(4096, 1, b"")
    run_loop(source, device.fd, monkeypatch, strange)
    assert sheet.snapshot()["UNKNOWN"][:2] == (1, 0)
    assert sheet.snapshot()["UNKNOWN"].errnos == {"ENOSYS": 1}


def test_loop_does_not_count_requests_of_workers(
    source: Source, sheet: ProcessCounters, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source.path / "file").write_bytes(b"content")
    nodeid, _ = source.tree.lookup(1, b"file")
    number, _ = source.files.open(nodeid, os.O_RDWR, False, MYSELF)
    fsync = request(Opcode.FSYNC, nodeid, struct.pack("=QII", number, 0, 0))
    run_loop(source, device.fd, monkeypatch, fsync)
    assert sheet.snapshot() == {}
    slots = source.context.router.slots
    ((slot, _),) = slots.lent_to(source.context.handles.get(number).shard)
    assert slots.metrics.begun[slot] > 0
    slots.give_back(slot)


def test_open_handles_are_counted(source: Source) -> None:
    gauge = source.context.router.slots.metrics.gauge(Gauge.HANDLES)
    numbers = [source.files.opendir(1, MYSELF)[0] for _ in range(3)]
    assert gauge[0] == 3
    for number in numbers:
        source.files.release(number)
    assert gauge[0] == 0


def test_forgotten_inodes_are_not_counted(source: Source) -> None:
    gauge = source.context.router.slots.metrics.gauge(Gauge.INODES)
    (source.path / "file").touch()
    nodeid, _ = source.tree.lookup(1, b"file")
    assert gauge[0] == 2
    source.tree.forget(nodeid, 1)
    assert gauge[0] == 1
