"""A worker with system calls that take long: which requests go on, which wait, which descriptors stay open."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llloop.linux.credentials import SetidGuard
from llloop.shared.leadership import MAX_THREADS, Leadership
from llloop.shared.messages import BUFFERED, Operation, Request, encode
from llloop.shared.metrics import ProcessCounters
from llloop.shared.slots import Slots
from llloop.workers.descriptors import Descriptors
from llloop.workers.invalidations import Invalidations
from llloop.workers.loop import Worker
from llloop.workers.operations import Operations
from llloop.workers.replies import KernelReplies
from tests.expect import fails
from tests.server_processes import wait_until
from tests.unit.front.test_held_up import TIMEOUT, BlockedCall
from tests.unit.support import Device, OwnIdentity

CONTENT = b"0123456789"


class Open(Descriptors):
    """Descriptors that do not come from a front."""

    def get(self, handle: int, descriptor: int, file: int = 0) -> int:
        return self.held[handle]

    @property
    def held(self) -> dict[int, int]:
        return self._held


class Running:
    """A worker that serves in a thread."""

    def __init__(self, device: Device, directory: Path) -> None:
        self.slots = Slots(2 * MAX_THREADS, 1 << 16, 1)
        self.descriptors = Open(self.slots)
        self.device = device
        self.directory = directory
        self.answered: list[int] = []
        self._reader, self.writer = os.pipe2(os.O_DIRECT)
        leadership, invalidations = Leadership(), Invalidations(-1)
        replies = KernelReplies(device.fd, self.slots.payload_size, leadership)
        operations = Operations(
            self.slots,
            self.descriptors,
            replies,
            SetidGuard(),
            OwnIdentity(),
            ProcessCounters(),
            invalidations,
            None,
            leadership,
        )
        self.worker = Worker(
            0, self.slots, self._reader, operations, ProcessCounters(), self.descriptors, leadership, invalidations
        )
        self._thread = threading.Thread(target=self.worker.run)
        self.unique = 0

    def open(self, handle: int) -> int:
        path = self.directory / f"file{handle}"
        path.write_bytes(CONTENT)
        self.descriptors.held[handle] = os.open(path, os.O_RDWR)
        return self.descriptors.held[handle]

    def content(self, handle: int) -> bytes:
        return (self.directory / f"file{handle}").read_bytes()

    def start(self) -> None:
        self._thread.start()

    def lend(self, operation: Operation, handle: int, payload: bytes = b"", flags: int = 0) -> bytes:
        self.unique += 1
        slot = self.slots.free_slot()
        self.slots.payload(slot, len(payload))[:] = payload
        length = len(payload) or len(CONTENT)
        request = Request(operation, self.unique, slot, handle, 0, 0, length, flags, nodeid=handle)
        message: bytes = encode(request)
        self.slots.lend(slot, 0, message, self.unique)
        return message

    def ask(self, operation: Operation, handle: int, payload: bytes = b"", flags: int = 0) -> int:
        os.write(self.writer, self.lend(operation, handle, payload, flags))
        return self.unique

    def tell(self, operation: Operation, *extra: int) -> None:
        os.write(self.writer, encode((operation, 0, -1, -1, -1, 0, 0, 0, 0, 0, extra)))

    def has_answered(self, *uniques: int) -> bool:
        self.answered += [reply.unique for reply in self.device.take()]
        return all(unique in self.answered for unique in uniques)

    def answers(self, *uniques: int) -> None:
        assert wait_until(lambda: self.has_answered(*uniques))

    def end(self) -> None:
        os.close(self.writer)
        if self._thread.ident is not None:
            self._thread.join(TIMEOUT)
            assert not self._thread.is_alive()
        os.close(self._reader)
        for fd in self.descriptors.held.values():
            os.close(fd)
        assert self.slots.lent_to(0) == []


@pytest.fixture
def running(device: Device, tmp_path: Path) -> Iterator[Running]:
    own = Running(device, tmp_path)
    for handle in range(1, 41):
        own.open(handle)
    yield own
    own.end()


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], BlockedCall]]:
    """Hold up all calls of a function of os; let go of them at the end."""
    held: list[BlockedCall] = []

    def do(name: str) -> BlockedCall:
        held.append(BlockedCall(getattr(os, name)))
        monkeypatch.setattr(os, name, held[-1])
        return held[-1]

    yield do
    for one in held:
        one.release()


def test_other_requests_are_answered_while_a_write_blocks(running: Running, hold: Callable[[str], BlockedCall]) -> None:
    pwrite = hold("pwrite")
    running.start()
    write = running.ask(Operation.WRITE, 1, b"new")
    assert wait_until(lambda: pwrite.waiting == 1)
    running.answers(running.ask(Operation.READ, 2), running.ask(Operation.FSYNC, 3), running.ask(Operation.READ, 1))
    assert not running.has_answered(write)
    pwrite.release()
    running.answers(write)
    assert running.content(1) == b"new3456789"


def test_changes_of_a_file_are_done_in_order(running: Running, hold: Callable[[str], BlockedCall]) -> None:
    pwrite = hold("pwrite")
    running.start()
    first = running.ask(Operation.WRITE, 1, b"first")
    assert wait_until(lambda: pwrite.waiting == 1)
    later = [running.ask(Operation.WRITE, 1, b"second"), running.ask(Operation.WRITE, 1, b"3rd")]
    buffered = running.ask(Operation.READ, 1, flags=BUFFERED)
    other = running.ask(Operation.WRITE, 2, b"other")
    assert wait_until(lambda: pwrite.waiting == 2)
    running.answers(running.ask(Operation.READ, 3))
    assert pwrite.waiting == 2, "two threads write to one file"
    pwrite.release()
    running.answers(first, *later, buffered, other)
    of_the_file = [unique for unique in running.answered if unique in (first, *later, buffered)]
    assert of_the_file == [first, *later, buffered]
    assert running.content(1) == b"3rdond6789"


def test_last_thread_only_does_reads(running: Running, hold: Callable[[str], BlockedCall]) -> None:
    pwrite = hold("pwrite")
    running.start()
    writes = []
    for handle in range(1, MAX_THREADS + 5):
        writes.append(running.ask(Operation.WRITE, handle, b"new"))
        assert wait_until(lambda: pwrite.waiting == min(len(writes), MAX_THREADS - 1))
    running.answers(running.ask(Operation.READ, 40), running.ask(Operation.READ, 1))
    assert pwrite.waiting == MAX_THREADS - 1
    pwrite.release()
    running.answers(*writes)
    assert all(running.content(handle) == b"new3456789" for handle in range(1, MAX_THREADS + 5))


def test_reads_of_one_file_do_not_occupy_all_threads(running: Running, hold: Callable[[str], BlockedCall]) -> None:
    fsync = hold("fsync")
    running.start()
    syncs = [running.ask(Operation.FSYNC, 1) for _ in range(MAX_THREADS + 5)]
    assert wait_until(lambda: fsync.waiting > 0)
    running.answers(running.ask(Operation.WRITE, 2, b"new"), running.ask(Operation.READ, 1 + 1))
    fsync.release()
    running.answers(*syncs)


def test_released_descriptor_stays_open_while_in_use(running: Running, hold: Callable[[str], BlockedCall]) -> None:
    pwrite = hold("pwrite")
    running.start()
    fd = running.descriptors.held[1]
    write = running.ask(Operation.WRITE, 1, b"new")
    assert wait_until(lambda: pwrite.waiting == 1)
    running.tell(Operation.RELEASE, 1, 2)
    running.answers(running.ask(Operation.READ, 3))
    os.fstat(fd)
    pwrite.release()
    running.answers(write)
    assert running.content(1) == b"new3456789"
    assert wait_until(lambda: not os.path.exists(f"/proc/self/fd/{fd}"))
    with fails(9):
        os.fstat(fd)


def test_slow_close_does_not_block_other_requests(running: Running, hold: Callable[[str], BlockedCall]) -> None:
    """The last close(2) of a large file that was removed frees its blocks."""
    close = hold("close")
    running.start()
    running.tell(Operation.RELEASE, 1)
    assert wait_until(lambda: close.waiting == 1)
    running.answers(running.ask(Operation.READ, 2), running.ask(Operation.WRITE, 3, b"new"))
    close.release()


def test_request_in_progress_is_not_begun_again(running: Running, hold: Callable[[str], BlockedCall]) -> None:
    """The pipe may contain a message that the previous worker has read, and a front may send RESUME."""
    pwrite = hold("pwrite")
    message = running.lend(Operation.WRITE, 1, b"new")
    unique = running.unique
    running.worker.recover()
    running.start()
    assert wait_until(lambda: pwrite.waiting == 1)
    os.write(running.writer, message)
    running.tell(Operation.RESUME, unique)
    running.answers(running.ask(Operation.READ, 2))
    pwrite.release()
    running.answers(unique)
    running.answers(running.ask(Operation.READ, 2))
    assert pwrite.waiting == 1
    assert running.answered.count(unique) == 1
