"""Answers as the kernel receives them: copied and spliced, complete, short, and beyond the end of the file."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llloop.linux import fuse
from llloop.shared.messages import Operation, Request, decode_answer
from llloop.shared.slots import Slots
from llloop.workers.replies import COPY_LIMIT, FrontReplies, KernelReplies, read_fully
from tests.expect import fails, pattern
from tests.unit.support import Device, Reply, open_descriptors

LARGEST = 128 * fuse.PAGE_SIZE
SIZE = LARGEST + 5000
CONTENT = pattern(SIZE)


def read_request(offset: int, length: int, unique: int = 5) -> Request:
    return Request(Operation.READ, unique, 0, 1, -1, offset, length)


@pytest.fixture
def replies(device: Device) -> KernelReplies:
    return KernelReplies(device.fd, LARGEST)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    path = tmp_path_factory.mktemp("replies") / "content"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_error_reply(replies: KernelReplies, device: Device) -> None:
    replies.error(read_request(0, 1), errno.EIO)
    replies.error(read_request(0, 1, unique=2**64 - 1), 0)
    assert device.take() == [Reply(5, errno.EIO, b""), Reply(2**64 - 1, 0, b"")]


def test_count_and_offset_replies(replies: KernelReplies, device: Device) -> None:
    replies.count(read_request(0, 1), 2**32 - 1)
    replies.position(read_request(0, 1), 2**63 - 1)
    assert device.take() == [
        Reply(5, 0, struct.pack("=II", 2**32 - 1, 0)),
        Reply(5, 0, struct.pack("=Q", 2**63 - 1)),
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(offset=st.integers(0, SIZE + 10), length=st.integers(0, LARGEST))
@example(offset=0, length=0)
@example(offset=0, length=COPY_LIMIT)
@example(offset=0, length=COPY_LIMIT + 1)
@example(offset=0, length=LARGEST)
@example(offset=1, length=LARGEST)  # a page more than its length has
@example(offset=4095, length=LARGEST)
@example(offset=5001, length=LARGEST)  # one byte less than requested
@example(offset=SIZE - COPY_LIMIT - 1, length=COPY_LIMIT + 2)
@example(offset=SIZE, length=LARGEST)
@example(offset=2**40, length=LARGEST)
def test_data_reply_contains_the_range(
    replies: KernelReplies, device: Device, content: int, offset: int, length: int
) -> None:
    expected = CONTENT[offset : offset + length]
    assert replies.data(read_request(offset, length), content) == len(expected)
    assert device.only() == Reply(5, 0, expected)


def test_only_large_reads_are_spliced(replies: KernelReplies, content: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spliced = []
    splice = os.splice

    def noted(*arguments: int, **options: int) -> int:
        count = splice(*arguments, **options)
        spliced.append(count)
        return count

    monkeypatch.setattr(os, "splice", noted)
    replies.data(read_request(0, COPY_LIMIT), content)
    assert not spliced
    replies.data(read_request(0, LARGEST), content)
    assert sum(spliced) == 2 * LARGEST + fuse.OUT_HEADER_SIZE, "into the pipe, and with the header out of it"


def test_hole_reads_as_zeros(replies: KernelReplies, device: Device, tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb+") as file:
        file.truncate(LARGEST)
        file.seek(LARGEST // 2)
        file.write(b"x")
        file.flush()
        replies.data(read_request(0, LARGEST), file.fileno())
    assert device.only().payload == bytes(LARGEST // 2) + b"x" + bytes(LARGEST // 2 - 1)


def test_direct_read_reaches_the_unaligned_end(replies: KernelReplies, device: Device, content: int) -> None:
    try:
        fd = os.open(f"/proc/self/fd/{content}", os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("the temporary directory's file system has no O_DIRECT")
    try:
        for offset, length in ((0, LARGEST), (LARGEST, LARGEST), (LARGEST, fuse.PAGE_SIZE * 2)):
            replies.data(read_request(offset, length), fd)
            assert device.only().payload == CONTENT[offset : offset + length]
    finally:
        os.close(fd)


@pytest.mark.parametrize("length", [100, LARGEST])
def test_file_without_splice_is_copied(replies: KernelReplies, device: Device, length: int) -> None:
    """Files in /proc do not support splice(2)."""
    with open("/proc/cpuinfo", "rb", buffering=0) as file:
        replies.data(read_request(0, length), file.fileno())
    reply = device.only()
    assert reply.error == 0
    assert reply.payload[:9] == b"processor"[: len(reply.payload)]


@pytest.mark.parametrize("length", [100, LARGEST])
def test_read_error_is_raised(
    replies: KernelReplies, device: Device, content: int, tmp_path: Path, length: int
) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with fails(errno.EISDIR):
            replies.data(read_request(0, length), fd)
    finally:
        os.close(fd)
    write_only = os.open(tmp_path / "new", os.O_WRONLY | os.O_CREAT)
    try:
        with fails(errno.EBADF):
            replies.data(read_request(0, length), write_only)
    finally:
        os.close(write_only)
    assert device.take() == []
    replies.data(read_request(3, LARGEST), content)
    assert device.only().payload == CONTENT[3 : 3 + LARGEST], "something of the failed answer was left"


@pytest.mark.parametrize("lost", [100, LARGEST])
def test_refused_answer_leaves_no_data_in_the_pipe(
    replies: KernelReplies, device: Device, content: int, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """The kernel refuses it with ENOENT. The next answer must not begin with the rest of it."""
    write, splice = os.write, os.splice

    def refuse() -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def gone_write(fd: int, data: bytes) -> int:
        if fd == device.fd:
            refuse()
        return write(fd, data)

    def gone_splice(source: int, target: int, *arguments: int, **options: int) -> int:
        if target == device.fd:
            refuse()
        return splice(source, target, *arguments, **options)

    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", gone_write)
        patch.setattr(os, "splice", gone_splice)
        assert replies.data(read_request(0, lost), content) == lost
        replies.error(read_request(0, 0), 0)
        replies.count(read_request(0, 0), 1)
    assert device.take() == []
    assert open_descriptors() == before
    replies.data(read_request(1, LARGEST, unique=6), content)
    assert device.only() == Reply(6, 0, CONTENT[1 : 1 + LARGEST])


def test_error_of_the_device_is_raised(content: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        replies = KernelReplies(writer, LARGEST)
        with fails(errno.EPIPE):
            replies.error(read_request(0, 0), 0)
        with fails(errno.EPIPE):
            replies.data(read_request(0, LARGEST), content)
    finally:
        os.close(writer)


def test_data_is_copied_if_the_pipe_stays_small(
    replies: KernelReplies, device: Device, content: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's limit of pipe pages may be reached (pipe(7))."""
    control = fcntl.fcntl

    def refuse(fd: int, command: int, *arguments: int) -> int:
        if command == fcntl.F_SETPIPE_SZ:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return int(control(fd, command, *arguments))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    for _ in range(2):
        assert replies.data(read_request(7, LARGEST), content) == LARGEST
        assert device.only().payload == CONTENT[7 : 7 + LARGEST]


def test_splice_error_leaves_no_data_in_the_pipe(
    replies: KernelReplies, device: Device, content: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    splice = os.splice
    done: list[int] = []

    def failing(source: int, target: int, count: int, offset: int | None = None, **options: int) -> int:
        if offset is not None and done:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        moved = splice(source, target, min(count, 65536), offset, **options)
        done.append(moved)
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(os, "splice", failing)
        with fails(errno.ESTALE):
            replies.data(read_request(0, LARGEST), content)
    assert device.take() == []
    replies.data(read_request(11, LARGEST), content)
    assert device.only() == Reply(5, 0, CONTENT[11 : 11 + LARGEST])


@pytest.mark.parametrize("moved", [0, 65536, 65536 + 100])
def test_short_splice_is_completed(
    replies: KernelReplies, device: Device, content: int, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    splice = os.splice
    left = [moved]

    def stopping(source: int, target: int, count: int, offset: int | None = None, **options: int) -> int:
        if not left[0]:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        count = splice(source, target, min(count, left[0]), offset, **options)
        left[0] -= count
        return count

    monkeypatch.setattr(os, "splice", stopping)
    assert replies.data(read_request(9, LARGEST), content) == LARGEST
    assert device.only() == Reply(5, 0, CONTENT[9 : 9 + LARGEST])


# Reading to the end


def preadv_in_pieces(pieces: list[int | OSError], monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        piece = pieces.pop(0)
        if isinstance(piece, OSError):
            raise piece
        buffers[0][:piece] = CONTENT[offset : offset + piece]
        return piece

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [([10], 10), ([4, 6], 10), ([4, 3, 0], 7), ([0], 0), ([4, OSError(errno.EINVAL, "")], 4), ([1] * 10, 10)],
)
def test_short_reads_are_continued(pieces: list[int | OSError], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv_in_pieces(pieces, monkeypatch)
    buffer = bytearray(10)
    assert read_fully(-1, memoryview(buffer), 0) == expected
    assert buffer[:expected] == CONTENT[:expected]
    assert not pieces


@pytest.mark.parametrize("pieces", [[OSError(errno.EINVAL, "")], [4, OSError(errno.EIO, "")]])
def test_read_errors_are_not_mistaken_for_end_of_file(
    pieces: list[int | OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv_in_pieces(pieces, monkeypatch)
    with fails(errno.EINVAL, errno.EIO):
        read_fully(-1, memoryview(bytearray(10)), 0)


# Answers to a front that waits


@pytest.fixture
def answers() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe2(os.O_DIRECT | os.O_NONBLOCK)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_front_replies_send_results(slots: Slots, answers: tuple[int, int]) -> None:
    reader, writer = answers
    replies = FrontReplies(writer, slots)
    request = read_request(0, 1, unique=2**63)
    replies.error(request, errno.ENOSPC)
    replies.error(request, 0)
    replies.count(request, 2**31)
    replies.position(request, 2**62)
    results = [decode_answer(os.read(reader, 4096)) for _ in range(4)]
    assert results == [(2**63, -errno.ENOSPC), (2**63, 0), (2**63, 2**31), (2**63, 2**62)]


def test_front_replies_put_data_into_the_slot(slots: Slots, answers: tuple[int, int], content: int) -> None:
    reader, writer = answers
    replies = FrontReplies(writer, slots)
    request = Request(Operation.READ, 1, 3, 1, -1, SIZE - 100, 4096)
    assert replies.data(request, content) == 100
    assert decode_answer(os.read(reader, 4096)) == (1, 100)
    assert slots.payload(3, 100) == CONTENT[-100:]
