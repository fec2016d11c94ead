"""The operations of a worker on files, with a file instead of /dev/fuse: effects, answers, and recovery."""

from __future__ import annotations

import errno
import logging
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from llloop.linux import syscalls
from llloop.linux.credentials import SetidGuard, Writer
from llloop.linux.fuse import FUSE_NOTIFY_INVAL_INODE, Opcode
from llloop.shared.messages import APPEND, DATA_ONLY, KILL_PRIVILEGES, SINGLE_CALL, Operation, Request, encode
from llloop.shared.metrics import BYTES, ERRORS, ProcessCounters
from llloop.shared.slots import Slots
from llloop.workers.invalidations import Invalidations
from llloop.workers.operations import Operations, opcode_of
from llloop.workers.replies import KernelReplies
from tests.as_user import Child
from tests.expect import pattern
from tests.syscalls import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from tests.unit import killable_front as mortal_module
from tests.unit.killable_front import Life
from tests.unit.support import Device, OwnIdentity, Reply

_BEGUN, _APPENDING, _SHIFTING, _DONE, _COPYING = range(5)


class Files:
    """Provides open files by handle, as `workers.descriptors` does."""

    def __init__(self) -> None:
        self.open: dict[int, int] = {}
        self.released: list[int] = []

    def get(self, handle: int, descriptor: int, file: int = 0) -> int:
        if handle not in self.open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self.open[handle]

    def release(self, handle: int) -> None:
        self.released.append(handle)


class Bench:
    """A worker without a front: lends and does requests, reads answers."""

    def __init__(self, slots: Slots, device: Device, directory: Path, writer: Writer | None = None) -> None:
        self.slots = slots
        self.device = device
        self.directory = directory
        self.files = Files()
        self.counters = ProcessCounters()
        self.asked = os.pipe2(os.O_CLOEXEC | os.O_DIRECT)
        self.invalidations = Invalidations(self.asked[1])
        self.replies = KernelReplies(device.fd, slots.payload_size)
        self.operations = Operations(
            slots,
            self.files,
            self.replies,
            SetidGuard(),
            writer or OwnIdentity(),
            self.counters,
            self.invalidations,
        )
        self.unique = 0
        # The notifications before the last answer.
        self.told: list[Reply] = []

    def open(self, handle: int, content: bytes = b"", flags: int = os.O_RDWR) -> Path:
        path = self.directory / f"file-{handle}"
        path.write_bytes(content)
        self.files.open[handle] = os.open(path, flags)
        return path

    def lend(
        self,
        operation: int,
        handle: int = 1,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        *,
        uid: int = 0,
        gid: int = 0,
        payload: bytes = b"",
        extra: tuple[Any, ...] = (),
    ) -> Request:
        self.unique += 1
        slot = self.slots.free_slot()
        length = len(payload) or length
        request = Request(operation, self.unique, slot, handle, 0, offset, length, flags, uid, gid, extra)
        self.slots.payload(slot, len(payload))[:] = payload
        self.slots.lend(slot, 1, encode(request), self.unique)
        return request

    def do(self, operation: int, **fields: Any) -> Reply:
        request = self.lend(operation, **fields)
        self.operations.execute(request)
        return self.answered(request)

    def answered(self, request: Request) -> Reply:
        *self.told, reply = self.device.take()
        assert reply.unique == request.unique
        assert not any(notification.unique for notification in self.told), "the request was answered twice"
        assert self.slots.free_slot() == 0, "the slot was not given back"
        return reply

    def counted(self, opcode: Opcode) -> tuple[int, int]:
        """Errors and bytes; the requests are counted by who hands them in."""
        return self.counters.rows[opcode][ERRORS], self.counters.rows[opcode][BYTES]

    def close(self) -> None:
        for fd in (*self.files.open.values(), *self.asked):
            os.close(fd)


def count_of(reply: Reply) -> int:
    assert reply.error == 0
    count, _ = struct.unpack("=II", reply.payload)
    return int(count)


@pytest.fixture
def bench(slots: Slots, device: Device, tmp_path: Path) -> Iterator[Bench]:
    own = Bench(slots, device, tmp_path)
    yield own
    own.close()


def test_read(bench: Bench) -> None:
    bench.open(1, pattern(10000))
    assert bench.do(Operation.READ, offset=5, length=100).payload == pattern(10000)[5:105]
    assert bench.do(Operation.READ, offset=9999, length=100).payload == pattern(10000)[9999:]
    assert bench.do(Operation.READ, offset=20000, length=100).payload == b""
    assert bench.counted(Opcode.READ) == (0, 101)


def test_write(bench: Bench) -> None:
    path = bench.open(1, b"0123456789")
    assert count_of(bench.do(Operation.WRITE, offset=3, payload=b"abc")) == 3
    assert count_of(bench.do(Operation.WRITE, offset=12, payload=b"end")) == 3
    assert path.read_bytes() == b"012abc6789\0\0end"
    assert bench.counted(Opcode.WRITE) == (0, 6)


def test_write_of_maximum_size(bench: Bench) -> None:
    path = bench.open(1)
    data = pattern(bench.slots.payload_size)
    assert count_of(bench.do(Operation.WRITE, offset=1, payload=data)) == len(data)
    assert path.read_bytes() == b"\0" + data


def test_append_goes_to_the_current_end(bench: Bench) -> None:
    path = bench.open(1, b"0123456789")
    with open(path, "ab") as behind:
        behind.write(b"behind")
    assert count_of(bench.do(Operation.WRITE, offset=2, payload=b"+", flags=APPEND)) == 1
    assert path.read_bytes() == b"0123456789behind+"


def test_fsync(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.open(1)
    called = []
    monkeypatch.setattr(os, "fsync", lambda fd: called.append(("fsync", fd)))
    monkeypatch.setattr(os, "fdatasync", lambda fd: called.append(("fdatasync", fd)))
    assert bench.do(Operation.FSYNC).error == 0
    assert bench.do(Operation.FSYNC, flags=DATA_ONLY).error == 0
    assert called == [("fsync", bench.files.open[1]), ("fdatasync", bench.files.open[1])]


def test_flush_and_syncfs_leave_the_descriptor_open(bench: Bench) -> None:
    bench.open(1)
    assert bench.do(Operation.FLUSH).error == 0
    assert bench.do(Operation.SYNCFS).error == 0
    os.fstat(bench.files.open[1])


def test_fallocate(bench: Bench) -> None:
    path = bench.open(1, b"x" * 8192)
    assert bench.do(Operation.FALLOCATE, offset=8192, length=4096, extra=(0,)).error == 0
    assert path.stat().st_size == 12288
    keep_size, punch_hole = 1, 2
    assert bench.do(Operation.FALLOCATE, offset=0, length=4096, extra=(keep_size | punch_hole,)).error == 0
    assert path.read_bytes()[:8192] == bytes(4096) + b"x" * 4096
    assert bench.do(Operation.FALLOCATE, offset=0, length=4096, extra=(0x4000,)).error == errno.EOPNOTSUPP


def test_lseek(bench: Bench) -> None:
    path = bench.open(1)
    with open(path, "r+b") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    found = bench.do(Operation.LSEEK, offset=0, extra=(os.SEEK_DATA,))
    assert 0 < struct.unpack("=Q", found.payload)[0] <= 1 << 19
    assert bench.do(Operation.LSEEK, offset=0, extra=(os.SEEK_HOLE,)).payload == bytes(8)
    assert bench.do(Operation.LSEEK, offset=1 << 20, extra=(os.SEEK_DATA,)).error == errno.ENXIO


def test_copy_file_range(bench: Bench) -> None:
    source = bench.open(1, b"source data")
    path = bench.open(2, b"target")
    os.utime(source, (1, 2))
    reply = bench.do(Operation.COPY_FILE_RANGE, handle=2, offset=3, length=100, extra=(1, 0, 7, 5, 0))
    assert count_of(reply) == 4
    assert path.read_bytes() == b"tardata"
    # The kernel knows that the target has changed, but not that the source's access time has.
    assert [struct.unpack_from("=Q", told.payload)[0] for told in bench.told] == [5] * (source.stat().st_atime != 1)
    bench.do(Operation.COPY_FILE_RANGE, handle=2, offset=3, length=100, extra=(1, 0, 7, 5, 0))
    assert bench.told == []


def test_attributes_are_expired_before_the_answer_clears_set_id_bits(bench: Bench) -> None:
    """If the kernel has not asked to clear the bits, the request contains the inode."""
    path = bench.open(1, b"program")
    path.chmod(0o4755)
    bench.do(Operation.WRITE, payload=b"x", extra=(9,))
    assert [(-told.error, told.payload) for told in bench.told] == [
        (FUSE_NOTIFY_INVAL_INODE, struct.pack("=Qqq", 9, -1, 0))
    ]
    path.chmod(0o755)
    bench.do(Operation.WRITE, payload=b"x", extra=(9,))
    assert bench.told == []


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS])
def test_unsupported_copy_file_range_gives_eopnotsupp(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    bench.open(1)
    bench.open(2)

    def refuse(*arguments: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert bench.do(Operation.COPY_FILE_RANGE, handle=2, length=1, extra=(1, 0, 0, 5, 0)).error == errno.EOPNOTSUPP


def test_copy_file_range_is_limited_to_what_a_reply_can_report(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.open(1)
    bench.open(2)
    asked = []

    def note(source: int, target: int, length: int, *offsets: int) -> int:
        asked.append(length)
        return 0

    monkeypatch.setattr(os, "copy_file_range", note)
    bench.do(Operation.COPY_FILE_RANGE, handle=2, length=2**63, extra=(1, 0, 0, 5, 0))
    assert 0 < asked[0] < 2**32


def test_source_errors_are_answered_and_counted(bench: Bench) -> None:
    bench.open(1, flags=os.O_RDONLY)
    bench.open(2, flags=os.O_WRONLY)
    assert bench.do(Operation.WRITE, payload=b"x").error == errno.EBADF
    assert bench.do(Operation.WRITE, payload=b"x", flags=APPEND).error == errno.EBADF
    assert bench.do(Operation.READ, handle=2, length=10).error == errno.EBADF
    assert bench.do(Operation.READ, handle=99, length=10).error == errno.EBADF
    assert (bench.counted(Opcode.READ), bench.counted(Opcode.WRITE)) == ((2, 0), (2, 0))


def test_unexpected_exceptions_give_eio_and_are_logged(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.open(1)

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(os, "fsync", broken)
    with caplog.at_level(logging.ERROR):
        assert bench.do(Operation.FSYNC).error == errno.EIO
    assert "a fault" in caplog.text
    assert bench.counted(Opcode.FSYNC) == (1, 0)


def test_unknown_operation_gives_eio(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    assert bench.do(99).error == errno.EIO


def test_release_is_not_answered(bench: Bench) -> None:
    bench.operations.execute(Request(Operation.RELEASE, 0, -1, -1, -1, extra=(4, 5)))
    assert bench.files.released == [4, 5]
    assert bench.device.take() == []
    assert bench.counters.snapshot() == {}


def test_request_without_a_slot_is_answered(bench: Bench) -> None:
    bench.open(1, b"abc")
    bench.operations.execute(Request(Operation.READ, 9, -1, 1, 0, 0, 10))
    assert bench.device.only() == Reply(9, 0, b"abc")


def test_set_id_bits_are_cleared_only_if_requested(bench: Bench) -> None:
    if os.geteuid() != 0:
        pytest.skip("an ordinary user's write always clears them")
    path = bench.open(1)

    def mode_after_write(flags: int) -> int:
        os.chmod(path, 0o6755)
        bench.do(Operation.WRITE, payload=b"x", flags=flags)
        return stat.S_IMODE(path.stat().st_mode)

    # In a child, because a change of this process's capabilities would affect other tests.
    flags = (0, KILL_PRIVILEGES, KILL_PRIVILEGES | APPEND, 0)
    assert Child(lambda: [mode_after_write(one) for one in flags]).result() == [0o6755, 0o755, 0o755, 0o6755]


def test_write_uses_the_ids_of_the_writing_user(slots: Slots, device: Device, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can write as others do")

    def identity_after_write() -> list[str]:
        bench = Bench(slots, device, tmp_path, Writer())
        bench.open(1)
        bench.do(Operation.WRITE, payload=b"x", uid=4711, gid=4712)
        lines = Path("/proc/self/status").read_text().splitlines()
        return [line.split()[4] for line in lines if line.startswith(("Uid:", "Gid:"))]

    assert Child(identity_after_write).result() == ["4711", "4712"]


# A worker died, and its successor finds a request that was not answered


def test_resume_repeats_a_read(bench: Bench) -> None:
    bench.open(1, b"content")
    request = bench.lend(Operation.READ, length=100)
    bench.operations.resume(request)
    assert bench.answered(request).payload == b"content"


def test_resume_does_a_write_that_was_not_begun(bench: Bench) -> None:
    path = bench.open(1, b"0123456789")
    request = bench.lend(Operation.WRITE, offset=4, payload=b"abc")
    bench.operations.resume(request)
    assert count_of(bench.answered(request)) == 3
    assert path.read_bytes() == b"0123abc789"


def test_resume_only_answers_a_write_that_was_done(bench: Bench) -> None:
    path = bench.open(1, b"0123456789")
    request = bench.lend(Operation.WRITE, offset=4, payload=b"abc")
    bench.slots.results[request.slot] = ~2
    bench.slots.stages[request.slot] = _DONE
    bench.operations.resume(request)
    assert count_of(bench.answered(request)) == 2
    assert path.read_bytes() == b"0123456789"


def test_resume_only_answers_an_append_that_was_done(bench: Bench) -> None:
    """The worker died between the two stores that note this. The file has grown too much to search for the data."""
    path = bench.open(1, b"log\nline\n" + bytes(3_000_000))
    request = bench.lend(Operation.WRITE, payload=b"line\n", flags=APPEND)
    bench.slots.results[request.slot] = ~5
    bench.slots.stages[request.slot] = _APPENDING
    bench.operations.resume(request)
    assert count_of(bench.answered(request)) == 5
    assert path.stat().st_size == 3_000_009


@pytest.mark.parametrize("operation", [Operation.FALLOCATE, Operation.COPY_FILE_RANGE])
def test_done_request_is_not_repeated_after_newer_writes(bench: Bench, operation: Operation) -> None:
    """The worker died between answer and giving back. Then the front wrote to the same range."""
    path = bench.open(1, b"0123456789")
    bench.open(2, b"abcdefghij")
    hole = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    extra = (hole,) if operation == Operation.FALLOCATE else (2, 0, 0, 5, 0)
    request = bench.lend(operation, length=10, extra=extra)
    bench.slots.results[request.slot] = ~10
    bench.slots.stages[request.slot] = _DONE
    bench.operations.resume(request)
    assert bench.answered(request).error == 0
    assert path.read_bytes() == b"0123456789"


def test_resume_does_an_append_that_was_not_begun(bench: Bench) -> None:
    path = bench.open(1, b"log\n")
    request = bench.lend(Operation.WRITE, payload=b"line\n", flags=APPEND)
    bench.operations.resume(request)
    assert count_of(bench.answered(request)) == 5
    assert path.read_bytes() == b"log\nline\n"


def test_resume_does_an_append_that_was_marked_but_not_written(bench: Bench) -> None:
    path = bench.open(1, b"log\n")
    request = begun(bench, b"line\n")
    bench.operations.resume(request)
    assert count_of(bench.answered(request)) == 5
    assert path.read_bytes() == b"log\nline\n"


class Killed(BaseException):
    """Stands for SIGKILL."""


def begun(bench: Bench, payload: bytes, written: int = -1, flags: int = APPEND) -> Request:
    """An append of *payload* whose worker was killed in the middle of the system call that appends.

    Args:
        bench: where.
        payload: what was to be appended.
        written: how much of it was written; -1: the call was not made.
        flags: of the request.
    """
    request = bench.lend(Operation.WRITE, payload=payload, flags=flags)
    die(bench, request, written)
    return request


def die(bench: Bench, request: Request, written: int, resume: bool = False) -> None:
    pwritev = os.pwritev

    def cut_short(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        if written >= 0:
            pwritev(fd, [memoryview(buffers[0])[:written]], offset, flags)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwritev", cut_short)
        with pytest.raises(Killed):
            (bench.operations.resume if resume else bench.operations.execute)(request)


def others_append(path: Path, content: bytes) -> None:
    with open(path, "ab") as file:
        file.write(content)


@pytest.mark.parametrize("after", [b"", b"another's line\n"])
@pytest.mark.parametrize("before", [b"", b"somebody was quicker\n"])
@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY])
def test_append_is_not_repeated(bench: Bench, before: bytes, after: bytes, flags: int) -> None:
    """The worker died between the write and noting that it was done."""
    path = bench.open(1, b"log\n", flags)
    request = begun(bench, b"line\n")
    others_append(path, before)
    die(bench, request, 5, resume=True)
    others_append(path, after)
    bench.operations.resume(request)
    assert count_of(bench.answered(request)) == 5
    assert path.read_bytes() == b"log\n" + before + b"line\n" + after


@pytest.mark.parametrize("theirs", [b"line\n", b"line\nline\n", b"line", b"line\nl"])
def test_appends_of_others_are_not_mistaken_for_ours(bench: Bench, theirs: bytes) -> None:
    """Even if the data is the same."""
    path = bench.open(1, b"log\n")
    request = begun(bench, b"line\n")
    others_append(path, theirs)
    bench.operations.resume(request)
    assert count_of(bench.answered(request)) == 5
    assert path.read_bytes() == b"log\n" + theirs + b"line\n"


@pytest.mark.parametrize("theirs", [b"", b"line\n", b"theirs\n"])
@pytest.mark.parametrize("written", [1, 4])
def test_partial_append_is_completed(bench: Bench, written: int, theirs: bytes) -> None:
    """SIGKILL can end a write in the middle."""
    path = bench.open(1, b"log\n")
    request = begun(bench, b"line\n", written)
    others_append(path, theirs)
    bench.operations.resume(request)
    assert count_of(bench.answered(request)) == 5
    assert path.read_bytes() == b"log\n" + b"line\n"[:written] + theirs + b"line\n"[written:]


@pytest.mark.parametrize("second", [-1, 1, 2, 4])
@pytest.mark.parametrize("first", [1, 3])
def test_partial_append_is_completed_after_two_deaths(bench: Bench, first: int, second: int) -> None:
    path = bench.open(1, b"log\n")
    request = begun(bench, b"line\n", first)
    die(bench, request, second, resume=True)
    bench.operations.resume(request)
    assert count_of(bench.answered(request)) == 5
    assert path.read_bytes() == b"log\nline\n"


@pytest.mark.parametrize("step", range(12))
def test_append_survives_death_of_successor_at_every_step(bench: Bench, step: int) -> None:
    path = bench.open(1, b"log\n")
    request = begun(bench, b"line\n", 3)
    life = Life(step)

    def killable_front(call: Any) -> Any:
        return life.around(call)

    class Cells:
        def __init__(self, cells: memoryview) -> None:
            self._cells = cells

        def __getitem__(self, place: int) -> int:
            return int(self._cells[place])

        def __setitem__(self, place: int, value: int) -> None:
            life.step()
            self._cells[place] = value

    slots = bench.slots
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lseek", "pwritev"):
            patch.setattr(os, name, killable_front(getattr(os, name)))
        for name in ("results", "written", "stages"):
            patch.setattr(slots, name, Cells(getattr(slots, name)))
        with suppress(mortal_module.Killed):
            bench.operations.resume(request)
    if bench.slots.states[request.slot]:
        bench.operations.resume(request)
    assert count_of(bench.answered(request)) == 5
    assert path.read_bytes() == b"log\nline\n"


def test_append_of_unknown_extent_gives_eio(bench: Bench) -> None:
    """The file was reopened, and others have written to it."""
    path = bench.open(1, b"log\n")
    request = begun(bench, b"line\n", 5)
    os.close(bench.files.open[1])
    bench.files.open[1] = os.open(path, os.O_RDWR)
    bench.operations.resume(request)
    assert bench.answered(request).error == errno.EIO
    assert path.read_bytes() == b"log\nline\n"


def test_append_to_reopened_unchanged_file_is_done(bench: Bench) -> None:
    path = bench.open(1, b"log\n")
    request = begun(bench, b"line\n")
    os.close(bench.files.open[1])
    bench.files.open[1] = os.open(path, os.O_RDWR)
    bench.operations.resume(request)
    assert count_of(bench.answered(request)) == 5
    assert path.read_bytes() == b"log\nline\n"


def test_mark_is_nearer_if_file_size_is_limited(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    lseek = os.lseek

    def limited(fd: int, position: int, whence: int) -> int:
        if position > 1 << 20:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return lseek(fd, position, whence)

    monkeypatch.setattr(os, "lseek", limited)
    path = bench.open(1, b"log\n")
    request = begun(bench, b"line\n")
    others_append(path, b"line\n")
    bench.operations.resume(request)
    assert count_of(bench.answered(request)) == 5
    assert path.read_bytes() == b"log\nline\nline\n"


def test_append_notes_its_progress(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.open(1, b"log\n")
    noted = []
    pwritev = os.pwritev

    def watched(*arguments: object) -> int:
        noted.append((bench.slots.stages[0], bench.slots.results[0]))
        return pwritev(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwritev", watched)
    bench.do(Operation.WRITE, payload=b"line\n", flags=APPEND)
    noted.append((bench.slots.stages[0], bench.slots.results[0]))
    assert noted == [(_APPENDING, 4), (_DONE, ~5)]


def test_each_operation_is_counted_with_its_opcode() -> None:
    for operation in set(Operation) - {Operation.RESUME, Operation.PROBE, Operation.INVALIDATED, Operation.TRACE}:
        request = Request(operation, 1, 0, 1, 1)
        assert opcode_of(request) == Opcode[operation.name]
    assert [opcode_of(Request(number, 1, 0, 1, 1)) for number in (-1, 0, Operation.PROBE, 99)] == [0, 0, 0, 0]


# A front died: the kernel sends again what its workers have not answered


RESENT = 1 << 63


class Deaf:
    """Stands before a kernel that refuses answers with certain `unique`, as if they were answers to nothing.

    Attributes:
        unheard: the numbers whose answers it refuses.
        refusing: called while it refuses one.
    """

    def __init__(self, device: int) -> None:
        self.unheard: set[int] = set()
        self.refusing: Callable[[], None] = lambda: None
        self._device = device
        self._write = os.write

    def write(self, fd: int, data: bytes | memoryview) -> int:
        """Stand in for write(2)."""
        if fd == self._device and struct.unpack_from("=Q", data, 8)[0] in self.unheard:
            self.refusing()
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self._write(fd, data)


@pytest.fixture
def deaf(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Deaf:
    own = Deaf(bench.device.fd)
    monkeypatch.setattr(os, "write", own.write)
    bench.slots.set_front(os.getpid())  # which has not yet received all requests that are sent again
    return own


def test_resent_append_is_only_answered_if_answer_was_refused(bench: Bench, deaf: Deaf) -> None:
    path = bench.open(1, b"log\n")
    request = bench.lend(Operation.WRITE, payload=b"line\n", flags=APPEND)
    deaf.unheard.add(request.unique)
    bench.operations.execute(request)
    assert bench.device.take() == []
    assert bench.slots.states[request.slot], "it was given back though nobody has had the answer"
    for _ in range(2):  # another front has died meanwhile
        bench.slots.set_front(os.getpid())
        deaf.unheard.add(request.unique | RESENT)
        bench.slots.claim(request.slot, request.unique | RESENT)
        bench.operations.resume(request)
        assert bench.slots.states[request.slot]
    deaf.unheard.clear()
    bench.operations.resume(request)
    assert count_of(bench.answered(request._replace(unique=request.unique | RESENT))) == 5
    assert path.read_bytes() == b"log\nline\n"


def test_resent_read_is_repeated_if_answer_was_refused(bench: Bench, deaf: Deaf) -> None:
    bench.open(1, b"content")
    request = bench.lend(Operation.READ, length=100)
    deaf.unheard.add(request.unique)
    bench.operations.execute(request)
    bench.slots.claim(request.slot, request.unique | RESENT)
    bench.operations.resume(request)
    assert bench.answered(request._replace(unique=request.unique | RESENT)).payload == b"content"


@pytest.mark.parametrize("operation", [Operation.READ, Operation.WRITE])
def test_request_resent_during_its_answer_is_answered_at_once(bench: Bench, deaf: Deaf, operation: Operation) -> None:
    path = bench.open(1, b"content")
    payload = b"CON" if operation == Operation.WRITE else b""
    request = bench.lend(operation, length=3, payload=payload)
    deaf.unheard.add(request.unique)
    deaf.refusing = lambda: bench.slots.claim(request.slot, request.unique | RESENT)
    bench.operations.execute(request)
    assert bench.answered(request._replace(unique=request.unique | RESENT)).error == 0
    assert path.read_bytes()[:3] == (b"CON" if payload else b"con")


def test_request_may_be_resent_with_the_same_unique(bench: Bench, deaf: Deaf) -> None:
    """Two fronts have died. An equal `unique` does not mean that the answer was given."""
    bench.open(1, b"content")
    request = bench.lend(Operation.READ, length=100)
    bench.slots.claim(request.slot, request.unique | RESENT)
    deaf.unheard |= {request.unique, request.unique | RESENT}

    def next_front_claims_and_finishes_takeover() -> None:
        bench.slots.set_front(os.getpid())
        bench.slots.claim(request.slot, request.unique | RESENT)
        bench.slots.note_resent_received()
        deaf.unheard.clear()

    deaf.refusing = next_front_claims_and_finishes_takeover
    bench.operations.resume(request)
    assert bench.answered(request._replace(unique=request.unique | RESENT)).payload == b"content"


@pytest.mark.parametrize("operation", [Operation.READ, Operation.WRITE])
def test_slot_of_an_answered_request_is_given_back(bench: Bench, deaf: Deaf, operation: Operation) -> None:
    path = bench.open(1, b"content")
    request = bench.lend(operation, length=3, payload=b"CON" if operation == Operation.WRITE else b"")
    deaf.unheard.add(request.unique)
    bench.operations.execute(request)
    path.write_bytes(b"newer data")
    bench.operations.resume(request)
    assert bench.slots.states[request.slot], "it may be sent again yet"
    bench.slots.note_resent_received()
    bench.operations.resume(request)
    if operation == Operation.WRITE:
        assert bench.slots.states[request.slot], "the kernel may have cached pages without this change"
        held = bench.invalidations.take(request.unique)
        assert held
        bench.operations.continue_held(held)
    assert bench.slots.free_slot() == 0
    assert bench.device.take() == []
    assert path.read_bytes() == b"newer data"


@pytest.mark.parametrize("length", [100, 100_000])
def test_single_call_requests_make_one_system_call(bench: Bench, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """A second read would get the next message. The second half of a command would be another command."""
    bench.open(1, b"message")
    calls: list[int] = []
    for name in ("preadv", "pwrite"):
        monkeypatch.setattr(os, name, _counted(getattr(os, name), calls))
    assert bench.do(Operation.READ, length=length, flags=SINGLE_CALL).payload == b"message"
    assert count_of(bench.do(Operation.WRITE, payload=pattern(length), flags=SINGLE_CALL | APPEND)) == length
    assert len(calls) == 2
    assert (bench.directory / "file-1").read_bytes() == pattern(length), "an append begins at the start, as natively"


def test_files_without_offsets_are_accessed_at_their_position(bench: Bench) -> None:
    """A pipe stands for trace_pipe and trace_marker of tracefs."""
    reader, writer = os.pipe()
    bench.files.open |= {1: reader, 2: writer}
    assert count_of(bench.do(Operation.WRITE, handle=2, payload=b"message", flags=SINGLE_CALL)) == 7
    assert bench.do(Operation.READ, length=100, offset=50, flags=SINGLE_CALL).payload == b"message"


def _counted(call: Callable[..., int], calls: list[int]) -> Callable[..., int]:
    def counted(*arguments: object) -> int:
        calls.append(call(*arguments))
        return calls[-1]

    return counted


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_write_is_retried_after_lack_of_space(bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The space of a removed file is free only when FORGET has arrived."""
    bench.open(1)
    bench.open(2, pattern(5000))
    for module, name in ((syscalls, "fallocate"), (os, "copy_file_range"), (os, "pwrite"), (os, "pwritev")):
        _refuse_at_first(monkeypatch, module, name, number)
    assert bench.do(Operation.FALLOCATE, length=9000, extra=(0,)).error == 0
    assert bench.do(Operation.COPY_FILE_RANGE, length=5000, extra=(2, 0, 0, 5, 0)).error == 0
    assert bench.do(Operation.WRITE, payload=b"written", offset=20_000).error == 0
    assert bench.do(Operation.WRITE, payload=b"appended", flags=APPEND).error == 0
    content = (bench.directory / "file-1").read_bytes()
    assert content == pattern(5000).ljust(20_000, b"\0") + b"written" + b"appended"


def _refuse_at_first(monkeypatch: pytest.MonkeyPatch, module: object, name: str, number: int) -> None:
    """Let a system call fail with *number* twice before it does what it should."""
    call, refusals = getattr(module, name), [number] * 2

    def late(*arguments: object) -> object:
        if refusals:
            raise OSError(refusals.pop(), "no room")
        return call(*arguments)

    monkeypatch.setattr(module, name, late)


# fallocate(2) with FALLOC_FL_COLLAPSE_RANGE or FALLOC_FL_INSERT_RANGE: done twice it moves twice

COLLAPSE, INSERT = 0x08, 0x20


@pytest.fixture
def shifting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A file system that can do it, wherever the test's files lie, and what it is asked for."""
    asked = []

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        asked.append(mode)
        data = os.pread(fd, 1 << 20, 0)
        shifted = data[:offset] + data[offset + length :]
        if mode == INSERT:
            shifted = data[:offset] + bytes(length) + data[offset:]
        os.ftruncate(fd, 0)
        os.pwrite(fd, shifted, 0)

    monkeypatch.setattr(syscalls, "fallocate", fallocate)
    return asked


@pytest.mark.parametrize(("mode", "after"), [(COLLAPSE, b"0156"), (INSERT, b"01\0\0\0" + b"23456")])
def test_collapse_and_insert_are_done_once(bench: Bench, shifting: list[int], mode: int, after: bytes) -> None:
    path = bench.open(1, b"0123456")
    assert bench.do(Operation.FALLOCATE, offset=2, length=3, extra=(mode,)).error == 0
    assert path.read_bytes() == after
    for stage, content in ((_BEGUN, b"0123456"), (_SHIFTING, b"0123456"), (_SHIFTING, after)):
        path.write_bytes(content)
        request = bench.lend(Operation.FALLOCATE, offset=2, length=3, extra=(mode,))
        bench.slots.stages[request.slot] = stage
        bench.slots.results[request.slot] = 7 if stage == _SHIFTING else 0
        bench.slots.written[request.slot] = path.stat().st_ctime_ns
        del shifting[:]
        bench.operations.resume(request)
        assert bench.answered(request).error == 0
        assert path.read_bytes() == after
        assert shifting == ([] if content == after else [mode])


def test_shift_notes_the_file_size(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.open(1, b"0123456")
    noted = []
    monkeypatch.setattr(
        syscalls, "fallocate", lambda *arguments: noted.append((bench.slots.stages[0], bench.slots.results[0]))
    )
    bench.do(Operation.FALLOCATE, offset=2, length=3, extra=(COLLAPSE,))
    bench.do(Operation.FALLOCATE, offset=2, length=3, extra=(INSERT,))
    assert noted == [(_SHIFTING, 7)] * 2
    request = bench.lend(Operation.FALLOCATE, offset=2, length=3, extra=(0,))
    bench.operations.execute(request)
    bench.answered(request)
    assert noted[2][0] == _BEGUN, "what can be done twice is"


@pytest.mark.parametrize("mode", [COLLAPSE, INSERT])
def test_resent_shift_is_only_answered_if_answer_was_refused(
    bench: Bench, deaf: Deaf, shifting: list[int], mode: int
) -> None:
    bench.open(1, b"0123456")
    request = bench.lend(Operation.FALLOCATE, offset=2, length=3, extra=(mode,))
    deaf.unheard.add(request.unique)
    bench.operations.execute(request)
    bench.slots.claim(request.slot, request.unique | RESENT)
    bench.operations.resume(request)
    assert bench.answered(request._replace(unique=request.unique | RESENT)).error == 0
    assert shifting == [mode]


@pytest.mark.parametrize("content", [b"0123456+", b"01234+6"])
@pytest.mark.parametrize("mode", [COLLAPSE, INSERT])
def test_shift_of_unknown_extent_gives_eio(bench: Bench, shifting: list[int], mode: int, content: bytes) -> None:
    path = bench.open(1, b"0123456")
    request = bench.lend(Operation.FALLOCATE, offset=2, length=3, extra=(mode,))
    bench.slots.results[request.slot], bench.slots.written[request.slot] = 7, path.stat().st_ctime_ns - 1
    bench.slots.stages[request.slot] = _SHIFTING
    path.write_bytes(content)
    bench.operations.resume(request)
    assert bench.answered(request).error == errno.EIO
    assert shifting == []
