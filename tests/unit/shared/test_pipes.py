"""Large writes from a pipe: spliced, copied if the file does not support splice, and continued after a death."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llloop.linux import fuse
from llloop.shared.messages import APPEND, BUFFERED, CACHED, PIPED, Operation, Request
from llloop.shared.pipes import PayloadPipes
from llloop.shared.slots import Slots
from tests.expect import pattern
from tests.unit.support import Device
from tests.unit.workers.test_operations import Bench, count_of

SIZE = 300_000


@pytest.fixture
def bench(slots: Slots, device: Device, tmp_path: Path) -> Iterator[Bench]:
    pipes = slots.open_pipes()
    own = Bench(slots, device, tmp_path)
    yield own
    own.close()
    pipes.close()


def pipes_of(bench: Bench) -> PayloadPipes:
    assert bench.slots.pipes is not None
    return bench.slots.pipes


def fill(pipes: PayloadPipes, slot: int, payload: bytes) -> None:
    source = os.memfd_create("requests")
    try:
        os.write(source, payload)
        os.lseek(source, 0, os.SEEK_SET)
        assert pipes.receive(slot, source) == len(payload)
    finally:
        os.close(source)


def lend(bench: Bench, payload: bytes, flags: int = 0, **more: Any) -> Request:
    request = bench.lend(Operation.WRITE, length=len(payload), flags=PIPED | flags, **more)
    fill(pipes_of(bench), request.slot, payload)
    return request


def test_payload_is_spliced_into_the_file(bench: Bench) -> None:
    path = bench.open(1, b"before")
    request = lend(bench, pattern(SIZE), offset=3)
    bench.slots.payload(0, SIZE)[:] = b"\xff" * SIZE  # the slot is not used
    bench.operations.execute(request)
    assert count_of(bench.answered(request)) == SIZE
    assert path.read_bytes() == b"bef" + pattern(SIZE)
    assert pipes_of(bench).left(0) == 0


def test_largest_payload_fits(bench: Bench) -> None:
    path = bench.open(1)
    payload = pattern(bench.slots.payload_size)
    request = lend(bench, payload)
    bench.operations.execute(request)
    assert count_of(bench.answered(request)) == len(payload)
    assert path.read_bytes() == payload


@pytest.mark.parametrize("flags", [APPEND, BUFFERED, APPEND | CACHED])
def test_appends_and_buffered_writes_are_copied(bench: Bench, flags: int) -> None:
    path = bench.open(1, b"before")
    request = lend(bench, pattern(SIZE), flags, offset=6)
    bench.operations.execute(request)
    assert count_of(bench.answered(request)) == SIZE
    assert path.read_bytes() == b"before" + pattern(SIZE)


def test_file_without_splice_is_copied(bench: Bench) -> None:
    # splice(2) refuses a descriptor with O_APPEND, as of a file that may only be appended to (chattr +a).
    path = bench.open(1, b"before", os.O_RDWR | os.O_APPEND)
    request = lend(bench, pattern(SIZE))
    bench.operations.execute(request)
    assert count_of(bench.answered(request)) == SIZE
    assert path.read_bytes() == b"before" + pattern(SIZE)


def test_error_is_answered_and_empties_the_pipe(bench: Bench) -> None:
    bench.open(1, flags=os.O_RDONLY)
    path = bench.open(2)
    request = lend(bench, pattern(SIZE))
    bench.operations.execute(request)
    assert bench.answered(request).error == errno.EBADF
    request = lend(bench, b"next" * 1000, handle=2)
    bench.operations.execute(request)
    assert count_of(bench.answered(request)) == 4000
    assert path.read_bytes() == b"next" * 1000


def test_unknown_handle_gives_error(bench: Bench) -> None:
    request = lend(bench, pattern(SIZE), handle=7)
    bench.operations.execute(request)
    assert bench.answered(request).error == errno.EBADF
    assert pipes_of(bench).left(0) == 0


@pytest.mark.parametrize("moved", [0, 4096, 100_000, SIZE])
def test_successor_continues_the_splice(bench: Bench, moved: int) -> None:
    path = bench.open(1)
    request = lend(bench, pattern(SIZE), offset=10)
    done = 0
    while done < moved:
        done += pipes_of(bench).move(0, bench.files.open[1], moved - done, 10 + done)
    bench.operations.resume(request)
    assert count_of(bench.answered(request)) == SIZE
    assert path.read_bytes() == bytes(10) + pattern(SIZE)


@pytest.mark.parametrize("flags", [BUFFERED, APPEND])
@pytest.mark.parametrize("copied", [0, 4096, SIZE])
def test_successor_copies_the_rest(bench: Bench, flags: int, copied: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench.open(1, b"before")
    request = lend(bench, pattern(SIZE), flags, offset=6)

    class Killed(BaseException):
        pass

    def die(self: PayloadPipes, slot: int, buffer: memoryview) -> int:
        if copied:
            os.readv(self._pipes[slot][0], [buffer[:copied]])
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(PayloadPipes, "take", die)
        with pytest.raises(Killed):
            bench.operations.execute(request)
    bench.operations.resume(request)
    assert count_of(bench.answered(request)) == SIZE
    assert path.read_bytes() == b"before" + pattern(SIZE)


def test_done_request_is_only_answered(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench.open(1)
    request = lend(bench, pattern(SIZE))

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(bench.replies, "count", die)
        with pytest.raises(Killed):
            bench.operations.execute(request)
    path.write_bytes(b"others wrote since")
    bench.operations.resume(request)
    assert count_of(bench.answered(request)) == SIZE
    assert path.read_bytes() == b"others wrote since"


def test_pipe_content_of_a_dead_front_is_discarded(bench: Bench) -> None:
    pipes = pipes_of(bench)
    lent = lend(bench, b"lent")
    fill(pipes, 1, pattern(SIZE))
    bench.slots.empty_pipes()
    assert (pipes.left(lent.slot), pipes.left(1)) == (4, 0)


def batch_forget(count: int) -> bytes:
    body = struct.pack("=II", count, 0) + b"".join(struct.pack("=QQ", 100 + number, 1) for number in range(count))
    return struct.pack("=IIQQIIIHH", 40 + len(body), fuse.Opcode.BATCH_FORGET, 7, 0, 0, 0, 0, 0, 0) + body


@pytest.mark.parametrize("count", [2, 3, 1000])
@pytest.mark.parametrize("begun", [False, True])
def test_batch_forget_of_a_dead_front_is_read_into_its_slot(bench: Bench, count: int, begun: bool) -> None:
    """The kernel does not send BATCH_FORGET again."""
    pipes = pipes_of(bench)
    request = batch_forget(count)
    fill(pipes, 1, request)
    buffer = bench.slots.buffer(1)
    if begun:
        pipes.take(1, buffer[: fuse.WRITE_HEADER_SIZE])
    bench.slots.empty_pipes()
    assert pipes.left(1) == 0
    assert bytes(buffer[: len(request)]) == request


def test_similar_data_is_not_mistaken_for_batch_forget(bench: Bench) -> None:
    pipes = pipes_of(bench)
    data = batch_forget(1000)
    header = struct.pack("=II", fuse.WRITE_HEADER_SIZE + len(data), fuse.Opcode.WRITE)
    fill(pipes, 1, data)
    bench.slots.buffer(1)[:8] = header
    bench.slots.empty_pipes()
    assert pipes.left(1) == 0
    assert bytes(bench.slots.buffer(1)[:8]) == header


def test_no_pipes_if_the_users_limit_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("llloop.shared.pipes.fcntl.fcntl", refuse)
    assert len(PayloadPipes(4, 4096)) == 0
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("flags", [0, CACHED])
def test_short_write_is_answered_unless_it_is_cached(bench: Bench, flags: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.open(1)
    request = lend(bench, pattern(SIZE), flags)
    move = PayloadPipes.move

    def cut(self: PayloadPipes, slot: int, fd: int, length: int, offset: int) -> int:
        if offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return move(self, slot, fd, 4096, offset)

    monkeypatch.setattr(PayloadPipes, "move", cut)
    bench.operations.execute(request)
    reply = bench.answered(request)
    assert reply.error == errno.EIO if flags else count_of(reply) == 4096


def test_write_is_retried_after_lack_of_space(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bench.open(1)
    request = lend(bench, pattern(SIZE), CACHED)
    move = PayloadPipes.move

    def full(self: PayloadPipes, slot: int, fd: int, length: int, offset: int) -> int:
        if offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return move(self, slot, fd, 4096, offset)

    monkeypatch.setattr(PayloadPipes, "move", full)
    bench.operations.execute(request)
    assert count_of(bench.answered(request)) == SIZE
    assert path.read_bytes() == pattern(SIZE)
