"""What the next front finds of all that a dead one knew and had open."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import struct
import time
from pathlib import Path

import pytest

from llloop.front.inodes import ROOT
from llloop.front.open_files import Handle
from llloop.front.tree import Tree
from llloop.linux.fuse import Opcode
from llloop.linux.syscalls import RENAME_EXCHANGE
from llloop.shared.negotiation import Feature
from tests.expect import fails
from tests.unit.front.recovery.test_resent import View, create_request, makedir, pair, rename_request, write
from tests.unit.killable_front import Killed, Life, Line, Request
from tests.unit.support import nodeid_of, packet_pipe

_EXCLUSIVE = os.O_RDWR | os.O_CREAT | os.O_EXCL


def listing(line: Line, handle: int, offset: int, size: int = 80) -> list[bytes]:
    body = struct.pack("=QQIIQII", handle, offset, size, 0, 0, 0, 0)
    data = line.answer(Request(Opcode.READDIR, ROOT, body)).payload
    names = []
    while data:
        length = int.from_bytes(data[16:20], "little")
        names.append(data[24 : 24 + length])
        data = data[24 + (length + 7) // 8 * 8 :]
    return names


def release(line: Line, handle: int) -> int:
    reply = line.answer(Request(Opcode.RELEASE, 0, struct.pack("=QIIQ", handle, 0, 0, 0)))
    return reply.error


def busy(line: Line) -> None:
    """A bit of everything that a front has to remember."""
    line.open(write(line, "open and removed"))
    line.answer(Request(Opcode.UNLINK, ROOT, b"open and removed\0"))
    write(line, "removed")
    line.answer(Request(Opcode.UNLINK, ROOT, b"removed\0"))
    write(line, "over")
    line.open(write(line, "victim", "the victim's"), os.O_RDONLY)
    line.answer(rename_request(b"over", b"victim"))
    linked = write(line, "linked")
    line.answer(Request(Opcode.LINK, ROOT, struct.pack("=Q", linked) + b"x" * 255 + b"\0"))
    directory = makedir(line, "directory")
    below = line.answer(Request(Opcode.MKDIR, directory, struct.pack("=II", 0o755, 0o022) + b"\xff" * 100 + b"\0"))
    inside = int.from_bytes(below.payload[:8], "little")
    line.answer(rename_request(b"linked", b"moved", ROOT, inside))
    line.answer(rename_request(b"directory", b"victim", flags=RENAME_EXCHANGE))
    line.answer(create_request())
    line.answer(Request(Opcode.SYMLINK, ROOT, pair(b"symlink", b"target")))
    gone = makedir(line, "gone")
    line.open(gone, os.O_DIRECTORY)
    line.answer(Request(Opcode.RMDIR, ROOT, b"gone\0"))
    line.lookup(b"symlink")
    line.lookup(b"new")


def open_handles(line: Line) -> dict[int, Handle]:
    return {number: line.context.handles.get(number) for number in line.context.handles}


def test_everything_is_as_it_was(line: Line) -> None:
    view = View(line)
    busy(line)
    view.learn()
    before = view.of_table(), view.of_descriptors(), view.of_reachability()
    assert len(before[0]["pins"]) == 4 and len(before[0]["handles"]) == 4
    handles = {
        number: (handle.descriptor, handle.nodeid, handle.flags, handle.shard, handle.write_flags, handle.read_flags)
        for number, handle in open_handles(line).items()
    }
    for _ in range(3):
        line.serve_resent()
        assert (view.of_table(), view.of_descriptors(), view.of_reachability()) == before
        assert handles == {
            number: (one.descriptor, one.nodeid, one.flags, one.shard, one.write_flags, one.read_flags)
            for number, one in open_handles(line).items()
        }
        assert all(handle.in_worker for handle in open_handles(line).values()), "a worker may hold it"
    # The pin is removed as without the death of the front.
    for number in handles:
        assert release(line, number) == 0
    for nodeid in list(line.context.inodes):
        if nodeid != ROOT:
            lookups = struct.pack("=Q", line.context.inodes.lookups(nodeid))
            line.kernel.send(Request(Opcode.FORGET, nodeid, lookups).packed(1))
            line.front.serve()
    assert len(line.context.inodes) == 1
    line.context.tree.directory_fds.shrink()
    assert line.extra_descriptors() == set()


def test_new_handles_have_new_numbers(line: Line) -> None:
    nodeid = write(line, "file")
    first = line.open(nodeid)
    line.serve_resent()
    second = line.open(nodeid)
    assert first != second
    assert release(line, first) == release(line, second) == 0


def test_descriptors_that_nothing_is_known_of_are_closed_when_all_has_come(line: Line) -> None:
    nodeid = write(line, "file")
    line.open(nodeid)
    before = line.extra_descriptors()
    stray = os.open(line.path / "file", os.O_RDONLY)
    line.serve_resent()
    with fails(errno.EBADF):
        os.fstat(stray)
    assert before <= line.extra_descriptors()


def test_a_listing_goes_on_where_it_was(line: Line) -> None:
    """Read afresh, it would leave out what moved up (rm -r)."""
    for number in range(30):
        (line.path / f"file-{number}").write_text("")
    handle = line.open(ROOT, os.O_DIRECTORY)
    found = listing(line, handle, 0)
    assert 0 < len(found) < 30
    for name in found:
        if name not in (b".", b".."):
            (line.path / os.fsdecode(name)).unlink()
    line.serve_resent()
    while more := listing(line, handle, len(found)):
        found += more
        line.serve_resent()
    assert len(found) == len(set(found)) == 32
    rewound = listing(line, handle, 0, 4096)
    assert len(rewound) == len(os.listdir(line.path)) + 2
    release(line, handle)
    line.context.tree.directory_fds.shrink()
    assert line.extra_descriptors() == set()


def test_a_large_directory_is_read_in_portions_by_several_fronts(line: Line) -> None:
    names = {b"name-%06d" % number for number in range(6000)}
    for name in names:
        (line.path / os.fsdecode(name)).touch()
    handle = line.open(ROOT, os.O_DIRECTORY)
    found: list[bytes] = []
    while more := listing(line, handle, len(found), 65536):
        found += more
        for name in more[:10]:
            if name not in (b".", b".."):
                (line.path / os.fsdecode(name)).unlink()
        line.serve_resent()
    assert len(found) == len(set(found))
    assert set(found) == names | {b".", b".."}
    release(line, handle)
    line.context.tree.directory_fds.shrink()
    assert line.extra_descriptors() == set()


@pytest.mark.parametrize("instead", [None, "other"])
def test_a_descriptor_that_is_lost_is_opened_again(line: Line, instead: str | None) -> None:
    """So it is where the keeper died together with the front."""
    (line.path / "other").write_text("other")
    handle = line.open(write(line, "file"))
    lost = line.context.handles.get(handle).descriptor
    os.close(lost)
    if instead:
        other = os.open(line.path / instead, os.O_RDONLY)
        os.dup2(other, lost, inheritable=False)
        os.close(other)
    line.serve_resent()
    assert os.pread(line.context.handles.get(handle).descriptor, 10, 0) == b"content"
    assert release(line, handle) == 0


def test_a_file_without_names_whose_descriptors_are_lost_is_lost_and_nothing_else(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    nodeid = write(line, "file")
    handle, other = line.open(nodeid), line.open(write(line, "other"))
    line.answer(Request(Opcode.UNLINK, ROOT, b"file\0"))
    os.close(line.context.handles.get(handle).descriptor)
    pin = line.context.tree.directory_fds.pins.get(nodeid)
    assert pin is not None
    os.close(pin)
    with caplog.at_level(logging.WARNING):
        line.serve_resent()
    assert "cannot be opened again" in caplog.text
    assert handle not in line.context.handles
    assert line.answer(Request(Opcode.GETATTR, nodeid, bytes(16))).error == errno.ESTALE
    assert release(line, other) == 0
    caplog.clear()
    line.serve_resent()
    assert caplog.records == [], "it is told once"


def lose(line: Line, *kept: int) -> list[int]:
    """Close what the front has open, as when the keeper dies with it; return the numbers, in their order."""
    lost = sorted(line.extra_descriptors() - set(kept))
    for fd in lost:
        os.close(fd)
    return lost


def places_of(line: Line, directories: list[int]) -> dict[int, int]:
    return {nodeid: os.fstat(line.context.tree.directory_fds.directory(nodeid)).st_ino for nodeid in directories}


def test_what_is_opened_to_find_lost_files_again_is_not_taken_for_the_dead_fronts(line: Line) -> None:
    """The directories on the way stay open; closed as strays, their numbers would come to mean others."""
    directories = []
    for number in range(8):
        directory = makedir(line, f"directory-{number}")
        directories.append(directory)
        (line.path / f"directory-{number}" / "file").write_text("content")
        line.open(line.lookup(b"file", directory))
    lose(line)
    line.serve_resent()
    expected = {nodeid: line.context.inodes.get(nodeid).number for nodeid in directories}
    assert places_of(line, directories) == expected
    for nodeid in directories:  # new descriptors may get closed numbers
        line.open(nodeid, os.O_DIRECTORY)
    assert places_of(line, directories) == expected


@pytest.mark.parametrize("flags", [(os.O_RDWR, os.O_RDWR), (os.O_RDONLY, os.O_RDWR), (os.O_RDWR, os.O_RDONLY)])
def test_no_two_open_files_come_to_share_a_descriptor(line: Line, flags: tuple[int, int]) -> None:
    """A file that is opened again gets a number that the record of another may name, which was lost as well."""
    nodeid = write(line, "file")
    first, second = (line.open(nodeid, how) for how in flags)
    lose(line)
    line.serve_resent()
    handles = [line.context.handles.get(number) for number in (first, second)]
    assert handles[0].descriptor != handles[1].descriptor
    for handle, how in zip(handles, flags, strict=True):
        assert fcntl.fcntl(handle.descriptor, fcntl.F_GETFL) & os.O_ACCMODE == how
    line.serve_resent()
    assert [line.context.handles.get(number).descriptor for number in (first, second)] == [
        handle.descriptor for handle in handles
    ], "where it is now is not in the journal"
    assert release(line, first) == 0
    assert os.pread(handles[1].descriptor, 10, 0) == b"content"


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_PATH])
def test_a_descriptor_of_the_same_file_that_was_opened_otherwise_is_another(line: Line, flags: int) -> None:
    handle = line.open(write(line, "file"))
    lost = line.context.handles.get(handle).descriptor
    os.close(lost)
    other = os.open(line.path / "file", flags)
    os.dup2(other, lost, inheritable=False)
    os.close(other)
    line.serve_resent()
    assert os.pwrite(line.context.handles.get(handle).descriptor, b"C", 0) == 1


def test_a_lost_listing_is_read_afresh_and_nothing_else_is_taken_for_it(line: Line) -> None:
    for number in range(30):
        (line.path / f"file-{number}").write_text("")
    handle = line.open(ROOT, os.O_DIRECTORY)
    listing(line, handle, 0)
    lost = line.context.handles.get(handle).snapshot
    assert lost >= 0
    os.close(lost)
    (line.path / "another").write_text("another")
    assert os.open(line.path / "another", os.O_RDONLY) == lost
    line.serve_resent()
    assert line.context.handles.get(handle).snapshot == -1
    assert listing(line, handle, 0, 4096)
    assert release(line, handle) == 0


def test_a_lost_pin_is_not_looked_for_among_what_was_opened_since(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note of an unlink names a descriptor of the file; the file is opened again under that number."""
    nodeid = write(line, "file")
    line.answer(Request(Opcode.LINK, ROOT, struct.pack("=Q", nodeid) + b"second\0"))
    handle = line.open(nodeid)
    killed_in(line, monkeypatch, Request(Opcode.UNLINK, ROOT, b"file\0"), "unlink")
    lose(line)
    line.serve_resent()
    assert os.pread(line.context.handles.get(handle).descriptor, 10, 0) == b"content"
    assert release(line, handle) == 0
    assert line.answer(Request(Opcode.GETATTR, nodeid, bytes(16))).error == 0


def killed_in(line: Line, monkeypatch: pytest.MonkeyPatch, request: Request, method: str) -> None:
    """Have the front die when the request is done, but for its answer."""
    do = getattr(Tree, method)

    def die_after(tree: Tree, *arguments: object) -> None:
        do(tree, *arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Tree, method, die_after)
        with pytest.raises(Killed):
            line.ask(request)


def test_what_was_done_is_known_though_other_requests_are_served_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next front dies at each of its steps, in another request, of which nothing was begun."""
    other = Request(Opcode.MKDIR, ROOT, struct.pack("=II", 0o755, 0o022) + b"new\0")
    for steps in range(100):
        with packet_pipe(8) as first, packet_pipe(8) as second:
            line = Line(tmp_path / f"source-{steps}", [first, second])
            try:
                write(line, "file")
                killed_in(line, monkeypatch, Request(Opcode.UNLINK, ROOT, b"file\0"), "unlink")
                (done,) = line.unanswered
                line.unanswered = {done - 1: other, **line.unanswered}
                life = Life(steps)
                with contextlib.suppress(Killed):
                    line.serve_resent(life)
                is_last = life.left is not None and life.taken < life.left
                if not is_last:
                    line.serve_resent()
                assert [line.answers[unique].error for unique in (done - 1, done)] == [0, 0], steps
            finally:
                line.close()
        if is_last:
            return
    raise AssertionError("it has no end")


@pytest.mark.parametrize(
    ("call", "request_"),
    [
        ("mkdir", Request(Opcode.MKDIR, ROOT, struct.pack("=II", 0o755, 0o022) + b"there\0")),
        ("mknod", Request(Opcode.MKNOD, ROOT, struct.pack("=IIII", stat.S_IFIFO | 0o644, 0, 0o022, 0) + b"there\0")),
        ("symlink", Request(Opcode.SYMLINK, ROOT, pair(b"there", b"target"))),
        ("open", Request(Opcode.CREATE, ROOT, struct.pack("=IIII", _EXCLUSIVE, 0o100644, 0o022, 0) + b"there\0")),
    ],
)
def test_what_was_there_before_was_not_made_by_the_request_though_it_has_changed_since(
    line: Line, monkeypatch: pytest.MonkeyPatch, call: str, request_: Request
) -> None:
    """Who makes a directory to lock something, and is told that he has, must be the only one."""
    makedir(line, "there")
    time.sleep(0.02)  # time stamps have the granularity of the kernel's clock tick

    def die(*arguments: object, **options: object) -> int:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, call, die)
        with pytest.raises(Killed):
            line.ask(request_)
    time.sleep(0.02)
    (line.path / "there").chmod(0o700)
    (interrupted,) = line.unanswered
    line.serve_resent()
    assert line.answers[interrupted].error == errno.EEXIST


@pytest.mark.parametrize("marked", [True, False])
def test_others_get_their_errors_for_what_the_interrupted_one_has_done(
    line: Line, monkeypatch: pytest.MonkeyPatch, marked: bool
) -> None:
    """Only the request itself is told that it has done it."""
    for request, method, number in (
        (Request(Opcode.MKDIR, ROOT, struct.pack("=II", 0o755, 0o022) + b"new\0"), "mkdir", errno.EEXIST),
        (Request(Opcode.RMDIR, ROOT, b"new\0"), "rmdir", errno.ENOENT),
        (Request(Opcode.SYMLINK, ROOT, pair(b"new", b"to")), "symlink", errno.EEXIST),
        (Request(Opcode.UNLINK, ROOT, b"new\0"), "unlink", errno.ENOENT),
    ):
        if number == errno.ENOENT:
            line.answer(Request(Opcode.LOOKUP, ROOT, b"new\0"))  # the kernel knows the removed file
        killed_in(line, monkeypatch, request, method)
        (interrupted,) = line.unanswered
        # An earlier request with the same content.
        other = interrupted + 1000
        del line.unanswered[interrupted]
        line.unanswered[other] = request
        if not marked:
            line.next_front(Life(None))
            line.kernel.send(request.packed(other))
            line.front.serve()
            line.collect()
        else:
            line.serve_resent()
        assert line.answers[other].error == number, method
        line.serve_resent()
        line.unanswered.clear()


def test_without_its_answer_nobody_is_told_of_an_inode(line: Line) -> None:
    """One that the front had looked up when it died, and that nobody asks for again, is forgotten."""
    (line.path / "file").write_text("")
    nodeid = line.context.tree.lookup(ROOT, b"file")[0]
    (line.path / "other").write_text("")
    line.unanswered[line.unique + 100] = Request(Opcode.LOOKUP, ROOT, b"other\0")  # sent again
    line.unique += 200
    line.serve_resent()
    assert nodeid not in line.context.inodes
    assert line.context.inodes.lookups(nodeid_of(line.context.inodes, line.path / "other")) == 1


def test_if_nothing_is_sent_again_the_answer_was_sent(line: Line) -> None:
    (line.path / "file").write_text("")
    nodeid = line.context.tree.lookup(ROOT, b"file")[0]
    line.serve_resent()
    assert line.context.inodes.lookups(nodeid) == 1
    line.serve_resent()
    assert line.context.inodes.lookups(nodeid) == 1


# Kernel passthrough


class Registrations:
    """What stands for FUSE_DEV_IOC_BACKING_OPEN and _CLOSE."""

    def __init__(self) -> None:
        self.live: set[int] = set()
        self._last = 0

    def ioctl(self, fd: int, what: int, argument: bytearray) -> int:
        if what == 0x4010E501:
            self._last += 1
            self.live.add(self._last)
            return self._last
        number = int.from_bytes(argument[:4], "little")
        if number not in self.live:
            raise FileNotFoundError(errno.ENOENT, "no such registration")
        self.live.remove(number)
        return 0


@pytest.fixture
def registrations(monkeypatch: pytest.MonkeyPatch) -> Registrations:
    own = Registrations()
    monkeypatch.setattr(fcntl, "ioctl", own.ioctl)
    return own


def test_registrations_with_the_kernel_go_along(tmp_path: Path, registrations: Registrations) -> None:
    with packet_pipe(8) as pipe:
        line = Line(tmp_path / "source", [pipe], Feature.PASSTHROUGH)
        nodeid = write(line, "file")
        first = line.open(nodeid)
        line.serve_resent()
        second = line.open(nodeid)
        assert registrations.live == {1}, "all opens of an inode share one"
        line.serve_resent()
        release(line, first)
        assert registrations.live == {1}
        line.serve_resent()
        release(line, second)
        assert registrations.live == set()
        line.close()


def test_no_registration_is_left_wherever_the_front_is_killed(tmp_path: Path, registrations: Registrations) -> None:
    """But between the kernel's answer and the note of it, for that cannot be known."""
    lost = []
    for steps in range(200):
        with packet_pipe(8) as pipe:
            line = Line(tmp_path / f"source-{steps}", [pipe], Feature.PASSTHROUGH)
            nodeid = write(line, "file")
            registrations.live.clear()
            died = False
            try:
                line.ask(Request(Opcode.OPEN, nodeid, struct.pack("=II", os.O_RDWR, 0)), Life(steps))
            except Killed:
                died = True
                line.serve_resent()
            used = {handle.backing for handle in open_handles(line).values()}
            assert len(used) == 1
            assert used <= registrations.live
            if registrations.live != used:
                lost.append(steps)
            line.close()
        if not died:
            break
    assert len(lost) <= 2
    assert len(lost) < 2 or lost[1] == lost[0] + 1
