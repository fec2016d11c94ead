"""Malformed bytes from the kernel and in the pipes: nothing crashes, and nothing leads out of the source."""

from __future__ import annotations

import errno
import logging
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llloop.front.inodes import ROOT
from llloop.front.loop import Loop
from llloop.front.request import FuseRequest
from llloop.linux import fuse
from llloop.linux.credentials import SetidGuard
from llloop.linux.fuse import Opcode
from llloop.shared.journal import Journal
from llloop.shared.leadership import Leadership
from llloop.shared.messages import Malformed, Operation, decode_strictly, encode
from llloop.shared.metrics import ProcessCounters
from llloop.shared.slots import Slots
from llloop.workers.descriptors import Descriptors
from llloop.workers.invalidations import Invalidations
from llloop.workers.loop import Worker
from llloop.workers.operations import Operations
from llloop.workers.replies import KernelReplies
from tests.hostile import Choices, hostile_request
from tests.unit.shared.test_messages import VALUES
from tests.unit.source import MYSELF, Source
from tests.unit.support import Device, OwnIdentity, Reply, packet_pipe

real_readv = os.readv


class Front:
    """A front's loop with a file instead of the kernel."""

    def __init__(self, directory: Path) -> None:
        self.outside = directory / "canary"
        self.outside.write_text("untouched")
        (directory / "source/directory").mkdir(parents=True)
        (directory / "source/file").write_bytes(b"content")
        (directory / "source/out").symlink_to(directory)
        self.device = Device()
        self._pipes = [packet_pipe(), packet_pipe()]
        self.source = Source(directory / "source", [pipe.__enter__() for pipe in self._pipes])
        self.loop = Loop(self.source.context, self.device.fd, Journal(64))
        self.nodeids = [ROOT, *(self.source.tree.lookup(ROOT, name)[0] for name in (b"file", b"directory", b"out"))]
        self.handles = [
            self.source.files.open(self.nodeids[1], os.O_RDWR, False, MYSELF)[0],
            self.source.files.opendir(ROOT, MYSELF)[0],
        ]

    def feed(self, packets: list[bytes]) -> list[Reply]:
        """Have the loop take these requests, and then the end of the mount."""
        waiting = iter(packets)

        def readv(fd: int, buffers: list[memoryview]) -> int:
            if fd != self.device.fd:
                return real_readv(fd, buffers)
            packet = next(waiting, None)
            if packet is None:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            packet = packet[: len(buffers[0])]
            buffers[0][: len(packet)] = packet
            return len(packet)

        with mock.patch("os.readv", readv):
            request = FuseRequest(self.source.context.router.slots.memory, self.source.context.intents.note(0))
            request.slot = self.source.context.router.slots.free_slot()
            while self.loop.receive(request):
                self.loop.serve(request)
        return self.device.take()

    def close(self) -> None:
        self.source.close()
        for pipe in self._pipes:
            pipe.__exit__(None, None, None)
        self.device.close()


@contextmanager
def front() -> Iterator[Front]:
    with tempfile.TemporaryDirectory() as directory:
        own = Front(Path(directory))
        try:
            yield own
        finally:
            own.close()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Of what is refused there is a lot to say."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def request(opcode: int, body: bytes = b"", nodeid: int = ROOT, unique: int = 4, length: int | None = None) -> bytes:
    said = 40 + len(body) if length is None else length
    return struct.pack("=IIQQIIII", said, opcode, unique, nodeid, 0, 0, 1, 0) + body


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_front_answers_any_request(data: bytes) -> None:
    choose = Choices(data)
    with front() as own:
        packets = [hostile_request(choose, 2 * number, own.nodeids, own.handles) for number in range(1, 9)]
        replies = own.feed(packets)
        numbers = [reply.unique for reply in replies]
        assert len(numbers) == len(set(numbers)), "a request was answered twice"
        assert set(numbers) <= {2 * number for number in range(1, 9)}
        assert all(0 <= reply.error < 512 for reply in replies)
        # It continues to serve, unless the kernel itself has requested the removal of the file.
        (alive,) = own.feed([request(Opcode.GETATTR, bytes(16), unique=100)])
        assert (alive.unique, alive.error) == (100, 0)
        assert own.outside.read_text() == "untouched"
        assert sorted(os.listdir(own.outside.parent)) == ["canary", "source"]


@pytest.mark.parametrize("name", [b"..", b".", b"", b"../canary", b"out/canary", b"..\0", b"..\0x", b"/etc"])
def test_names_that_leave_the_directory_are_refused(name: bytes) -> None:
    with front() as own:
        ended = name + b"\0"
        bodies = {
            Opcode.LOOKUP: ended,
            Opcode.UNLINK: ended,
            Opcode.CREATE: struct.pack("=IIII", os.O_RDWR, 0o644, 0o22, 0) + ended,
            Opcode.RENAME2: struct.pack("=QII", ROOT, 0, 0) + b"file\0" + ended,
        }
        replies = own.feed([request(opcode, body) for opcode, body in bodies.items()])
        assert [reply.error for reply in replies] == [errno.EINVAL] * 4
        assert own.outside.read_text() == "untouched" and (own.source.path / "file").exists()


@pytest.mark.parametrize(
    ("packet", "answers"),
    [
        (b"", []),
        (b"\x04", []),
        (request(Opcode.GETATTR)[:39], []),
        (request(Opcode.GETATTR), [errno.EINVAL]),
        (request(Opcode.GETATTR, bytes(16), length=57), [errno.EINVAL]),
        (request(Opcode.LOOKUP, b"file"), [errno.EINVAL]),
        (request(Opcode.WRITE, struct.pack("=QQIIQII", 1, 0, 6, 0, 0, 0, 0) + b"short"), [errno.EINVAL]),
        (request(Opcode.BATCH_FORGET, struct.pack("=IIQQ", 2, 0, 5, 1)), [errno.EINVAL]),
        (request(Opcode.SETXATTR, struct.pack("=IIII", 6, 0, 0, 0) + b"user.x\0short"), [errno.EINVAL]),
        (request(Opcode.MKDIR, struct.pack("=II", 0, 0)), [errno.EINVAL]),
        (request(Opcode.MKDIR, bytes(200_000)), [errno.EINVAL]),
        (request(Opcode.IOCTL, bytes(31)), [errno.EINVAL]),
        (request(Opcode.IOCTL, bytes(32)), [errno.EBADF]),
        (request(Opcode.INTERRUPT, bytes(7)), [errno.EINVAL]),
        (request(Opcode.INTERRUPT, bytes(8)), []),
        (request(Opcode.POLL, bytes(24)), [errno.ENOSYS]),
        (request(4096), [errno.ENOSYS]),
    ],
)
def test_malformed_requests_are_refused(packet: bytes, answers: list[int]) -> None:
    with front() as own:
        # Bytes of an earlier request in the slot must not complete this one.
        own.feed([request(Opcode.LOOKUP, b"file\0" * 100)])
        assert [reply.error for reply in own.feed([packet])] == answers


def test_invalid_offsets_are_refused() -> None:
    with front() as own:
        handle = own.handles[0]
        for offset in (1 << 63, (1 << 64) - 1):
            packet = request(Opcode.READ, struct.pack("=QQIIQII", handle, offset, 4096, 0, 0, 0, 0))
            (reply,) = own.feed([packet])
            assert reply.error == errno.EINVAL


# Through the pipes


class Files:
    """Open files as a worker has them: one, whatever is asked for."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("file")
        os.write(self.fd, b"content")

    def get(self, handle: int, descriptor: int, file: int = 0) -> int:
        if handle % 3 == 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self.fd

    def release(self, handle: int) -> None:
        """There is nothing to let go of."""


@contextmanager
def worker() -> Iterator[tuple[Worker, Slots, int, Device]]:
    slots, device, files = Slots(4, 8 * fuse.PAGE_SIZE, 2), Device(), Files()
    sheet = ProcessCounters()
    replies = KernelReplies(device.fd, slots.payload_size)
    reader, writer = os.pipe2(os.O_DIRECT)
    invalidations = Invalidations(writer)
    operations = Operations(slots, files, replies, SetidGuard(), OwnIdentity(), sheet, invalidations)
    try:
        yield (
            Worker(0, slots, reader, operations, sheet, Descriptors(slots), Leadership(), invalidations),
            slots,
            writer,
            device,
        )
    finally:
        for fd in (reader, files.fd):
            os.close(fd)
        device.close()


# Small sizes, or sizes that no file can have: a fallocate of a size between them might succeed.
FIELDS = st.one_of(st.integers(-3, 70_000), st.sampled_from([1 << 63, -(1 << 63), (1 << 64) - 1]), VALUES)
# Some that look like requests.
MESSAGES = st.one_of(
    st.binary(min_size=1, max_size=200),
    VALUES.map(encode),
    st.lists(FIELDS, min_size=5, max_size=13).map(encode),
    st.builds(
        lambda operation, numbers, extra: encode((operation, *numbers, extra)),
        st.sampled_from(list(Operation)),
        st.lists(st.integers(-3, 70_000), min_size=9, max_size=9),
        st.lists(FIELDS, max_size=4),
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(MESSAGES, max_size=4))
def test_worker_survives_any_message(messages: list[bytes]) -> None:
    with worker() as (own, _, writer, device):
        for message in [*messages, encode((Operation.FSYNC, 77, -1, 1, 2))]:
            os.write(writer, message)
        os.close(writer)
        own.run()
        end = os.fstat(device.fd).st_size
        last = os.pread(device.fd, fuse.OUT_HEADER_SIZE, end - fuse.OUT_HEADER_SIZE)
        assert last == fuse.error_reply(77, 0), "the sane request after them is done"


@settings(max_examples=200, deadline=None)
@given(st.lists(MESSAGES, max_size=3), st.binary(min_size=4, max_size=4), st.lists(st.integers(), min_size=4))
def test_recovering_worker_survives_any_slot_content(messages: list[bytes], stages: bytes, results: list[int]) -> None:
    """And no slot stays lent forever."""
    with worker() as (own, slots, writer, _):
        os.close(writer)
        for slot, message in enumerate(messages):
            slots.lend(slot, 0, message)
            slots.stages[slot] = stages[slot]
            slots.results[slot] = results[slot] % (1 << 62)
        own.recover()
        own.run()
        assert slots.lent_to(0) == []


@given(st.lists(st.integers(0, 9), min_size=10, max_size=10), st.integers(0, 10), VALUES)
def test_decode_strictly_only_accepts_numbers(numbers: list[int], place: int, value: Any) -> None:
    fields: list[Any] = [*numbers, [1, 2]]
    assert decode_strictly(encode(fields)) == (*numbers, (1, 2), 0, 0)
    fields[place] = value
    if type(value) is int and place < 10:
        return
    with pytest.raises(Malformed):
        decode_strictly(encode([*fields[:10], [value]] if place == 10 and type(value) is not int else fields))
