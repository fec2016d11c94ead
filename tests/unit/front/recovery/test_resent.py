"""Requests that must be done once: the front is killed at each of its steps, and the request is sent again.

Whatever the step, the answer must be that of one execution, and so must be the source, what is known of
it, and what is open.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import random
import stat
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from llloop.front import nowait
from llloop.front.inodes import ROOT
from llloop.front.recovery.intents import _CLOCK_REALTIME_COARSE
from llloop.linux import fuse
from llloop.linux.fuse import Opcode
from llloop.linux.syscalls import RAM_FILE_SYSTEMS, RENAME_EXCHANGE, RENAME_NOREPLACE
from tests.unit import killable_front
from tests.unit.killable_front import Killed, Life, Line, Request
from tests.unit.support import Reply, packet_pipe

_MOST_STEPS = 400
# A time stamp that a file only has if a call has set it, in seconds since 1970.
_LONG_AGO = 1_000_000_000


def pair(first: bytes, second: bytes) -> bytes:
    return first + b"\0" + second + b"\0"


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the test's source lies, the front does small writes itself."""
    monkeypatch.setattr(nowait, "file_system_type", lambda fd: next(iter(RAM_FILE_SYSTEMS)))


@dataclass
class Case:
    """A request and what is there before it.

    Attributes:
        make: prepares the source and returns the request.
        error: the errno of its answer.
        known: whether it tells the kernel of an inode that it knows already. Of these one lookup too few is counted if
            the front dies between answer and count; the kernel takes back all its lookups at once, so that is enough.
        again: the errno that its answer may have if it was done and is done again, for nobody looks at it.
    """

    make: Callable[[Line], Request]
    error: int = 0
    known: bool = False
    again: int = 0


CASES: dict[str, Case] = {}


def case(
    error: int = 0, *, known: bool = False, again: int = 0
) -> Callable[[Callable[[Line], Request]], Callable[[Line], Request]]:
    def note(make: Callable[[Line], Request]) -> Callable[[Line], Request]:
        CASES[make.__name__] = Case(make, error, known, again)
        return make

    return note


def write(line: Line, name: str, content: str = "content") -> int:
    """Make a file in the source and look it up."""
    (line.path / name).write_text(content)
    return line.lookup(name.encode())


def makedir(line: Line, name: str) -> int:
    (line.path / name).mkdir()
    return line.lookup(name.encode())


# Made


@case()
def mkdir(line: Line) -> Request:
    return Request(Opcode.MKDIR, ROOT, struct.pack("=II", 0o755, 0o022) + b"new\0")


@case()
def mkdir_below(line: Line) -> Request:
    return Request(Opcode.MKDIR, makedir(line, "dir"), struct.pack("=II", 0o755, 0o022) + b"new\0")


@case(errno.EEXIST)
def mkdir_where_one_is(line: Line) -> Request:
    (line.path / "new").mkdir()
    return mkdir(line)


@case()
def mknod(line: Line) -> Request:
    return Request(Opcode.MKNOD, ROOT, struct.pack("=IIII", stat.S_IFIFO | 0o644, 0, 0o022, 0) + b"new\0")


@case(errno.EEXIST)
def mknod_where_one_is(line: Line) -> Request:
    (line.path / "new").mkdir()
    return mknod(line)


@case()
def symlink(line: Line) -> Request:
    return Request(Opcode.SYMLINK, ROOT, pair(b"new", b"target/of it"))


@case(errno.EEXIST)
def symlink_where_one_is(line: Line) -> Request:
    (line.path / "new").symlink_to("target/of it")
    return symlink(line)


@case(known=True)
def link(line: Line) -> Request:
    return Request(Opcode.LINK, ROOT, struct.pack("=Q", write(line, "file")) + b"new\0")


@case(known=True)
def link_of_an_open_file_without_a_name(line: Line) -> Request:
    reply = line.answer(tmpfile(line))
    if reply.error:
        pytest.skip("the temporary directory's file system has no O_TMPFILE")
    return Request(Opcode.LINK, ROOT, reply.payload[:8] + b"new\0")


@case(errno.EEXIST)
def link_where_another_is(line: Line) -> Request:
    (line.path / "new").write_text("another")
    return link(line)


def create_request(flags: int = os.O_EXCL, mode: int = 0o640) -> Request:
    body = struct.pack("=IIII", os.O_RDWR | os.O_CREAT | flags, stat.S_IFREG | mode, 0o022, 0)
    return Request(Opcode.CREATE, ROOT, body + b"new\0")


@case()
def create(line: Line) -> Request:
    return create_request()


@case()
def create_without_excl(line: Line) -> Request:
    return create_request(0)


@case()
def create_what_its_maker_may_not_open(line: Line) -> Request:
    return create_request(mode=0)


@case(errno.EEXIST)
def create_where_one_is(line: Line) -> Request:
    (line.path / "new").write_text("precious")
    return create_request()


@case(errno.ESTALE)
def create_without_excl_where_one_is(line: Line) -> Request:
    (line.path / "new").write_text("precious")
    return create_request(0)


@case(errno.EEXIST)
def create_where_one_is_after_a_mkdir(line: Line) -> Request:
    """What is noted of an earlier request says nothing of this one."""
    line.answer(Request(Opcode.MKDIR, ROOT, struct.pack("=II", 0o755, 0o022) + b"dir\0"))
    return create_where_one_is(line)


@case()
def tmpfile(line: Line) -> Request:
    body = struct.pack("=IIII", os.O_RDWR, stat.S_IFREG | 0o600, 0o022, 0)
    return Request(Opcode.TMPFILE, ROOT, body + b"#1\0")


# Removed


@case()
def unlink(line: Line) -> Request:
    write(line, "file")
    return Request(Opcode.UNLINK, ROOT, b"file\0")


@case()
def unlink_of_an_open_file(line: Line) -> Request:
    line.open(write(line, "file"))
    return Request(Opcode.UNLINK, ROOT, b"file\0")


@case(errno.ESTALE)
def unlink_of_what_the_kernel_does_not_know(line: Line) -> Request:
    (line.path / "file").write_text("content")
    return Request(Opcode.UNLINK, ROOT, b"file\0")


@case()
def unlink_of_one_of_two_names(line: Line) -> Request:
    nodeid = write(line, "file")
    line.answer(Request(Opcode.LINK, ROOT, struct.pack("=Q", nodeid) + b"second\0"))
    return Request(Opcode.UNLINK, ROOT, b"file\0")


@case(errno.ENOENT)
def unlink_of_nothing(line: Line) -> Request:
    return Request(Opcode.UNLINK, ROOT, b"file\0")


@case(errno.EISDIR)
def unlink_of_a_directory(line: Line) -> Request:
    makedir(line, "dir")
    return Request(Opcode.UNLINK, ROOT, b"dir\0")


@case()
def rmdir(line: Line) -> Request:
    makedir(line, "dir")
    return Request(Opcode.RMDIR, ROOT, b"dir\0")


@case(errno.ENOTEMPTY)
def rmdir_of_what_is_full(line: Line) -> Request:
    line.lookup(b"x", makedir_with(line, "dir", "x"))
    return Request(Opcode.RMDIR, ROOT, b"dir\0")


def makedir_with(line: Line, name: str, inside: str) -> int:
    nodeid = makedir(line, name)
    (line.path / name / inside).write_text("inside")
    return nodeid


# Renamed


def rename_request(old: bytes, new: bytes, parent: int = ROOT, new_parent: int = ROOT, flags: int = 0) -> Request:
    if flags:
        return Request(Opcode.RENAME2, parent, struct.pack("=QII", new_parent, flags, 0) + pair(old, new))
    return Request(Opcode.RENAME, parent, struct.pack("=Q", new_parent) + pair(old, new))


@case()
def rename(line: Line) -> Request:
    write(line, "file")
    return rename_request(b"file", b"moved")


@case()
def rename_to_another_directory(line: Line) -> Request:
    write(line, "file")
    return rename_request(b"file", b"x" * 200, ROOT, makedir(line, "dir"))


@case()
def rename_of_a_directory(line: Line) -> Request:
    line.lookup(b"inside", makedir_with(line, "old", "inside"))
    return rename_request(b"old", b"new")


@case(errno.ESTALE)
def rename_of_what_the_kernel_does_not_know(line: Line) -> Request:
    (line.path / "file").write_text("content")
    return rename_request(b"file", b"moved")


@case()
def rename_over(line: Line) -> Request:
    write(line, "file")
    write(line, "victim", "the victim's")
    return rename_request(b"file", b"victim")


@case()
def rename_over_an_open_file(line: Line) -> Request:
    write(line, "file")
    line.open(write(line, "victim", "the victim's"))
    return rename_request(b"file", b"victim")


@case()
def rename_over_one_of_two_names(line: Line) -> Request:
    nodeid = write(line, "victim", "the victim's")
    line.answer(Request(Opcode.LINK, ROOT, struct.pack("=Q", nodeid) + b"another\0"))
    write(line, "file")
    return rename_request(b"file", b"victim")


@case(errno.ESTALE)
def rename_over_what_the_kernel_does_not_know(line: Line) -> Request:
    write(line, "file")
    (line.path / "victim").write_text("the victim's")
    return rename_request(b"file", b"victim")


@case()
def rename_over_a_directory(line: Line) -> Request:
    makedir(line, "dir")
    makedir(line, "empty")
    return rename_request(b"dir", b"empty")


@case()
def rename_over_another_name_of_the_same_file(line: Line) -> Request:
    nodeid = write(line, "file")
    line.answer(Request(Opcode.LINK, ROOT, struct.pack("=Q", nodeid) + b"second\0"))
    return rename_request(b"file", b"second")


@case()
def rename_without_replacing(line: Line) -> Request:
    write(line, "file")
    return rename_request(b"file", b"moved", flags=RENAME_NOREPLACE)


@case(errno.EEXIST)
def rename_without_replacing_what_is_there(line: Line) -> Request:
    write(line, "file")
    write(line, "there")
    return rename_request(b"file", b"there", flags=RENAME_NOREPLACE)


@case(errno.ENOENT)
def rename_of_nothing(line: Line) -> Request:
    return rename_request(b"file", b"moved")


@case()
def exchange(line: Line) -> Request:
    write(line, "file")
    line.lookup(b"inside", makedir_with(line, "dir", "inside"))
    return rename_request(b"file", b"dir", flags=RENAME_EXCHANGE)


@case(errno.ESTALE)
def exchange_with_what_the_kernel_does_not_know(line: Line) -> Request:
    write(line, "file")
    (line.path / "other").write_text("other")
    return rename_request(b"other", b"file", flags=RENAME_EXCHANGE)


# Changed


def setattr_request(nodeid: int, valid: int, mode: int = 0, owner: int = 0, size: int = 0, time: int = 0) -> Request:
    times = (time, time, 0, 0, 0, 0)
    return Request(
        Opcode.SETATTR, nodeid, struct.pack("=II6Q3I5I", valid, 0, 0, size, 0, *times, mode, 0, owner, owner, 0)
    )


@case()
def chmod(line: Line) -> Request:
    return setattr_request(write(line, "file"), fuse.FATTR_MODE, mode=0o4711)


@case()
def chmod_of_a_directory(line: Line) -> Request:
    return setattr_request(makedir(line, "dir"), fuse.FATTR_MODE, mode=0o2750)


@case()
def chown_and_chmod(line: Line) -> Request:
    """A new owner takes the set-ID bits away, which the mode then sets."""
    owner = 4001 if os.geteuid() == 0 else os.geteuid()
    valid = fuse.FATTR_UID | fuse.FATTR_GID | fuse.FATTR_MODE
    return setattr_request(write(line, "file"), valid, mode=0o6755, owner=owner)


@case()
def truncate_with_times(line: Line) -> Request:
    valid = fuse.FATTR_SIZE | fuse.FATTR_ATIME | fuse.FATTR_MTIME
    return setattr_request(write(line, "file"), valid, size=3, time=1_000_000)


@case()
def utimens_of_a_directory(line: Line) -> Request:
    return setattr_request(makedir(line, "dir"), fuse.FATTR_ATIME | fuse.FATTR_MTIME, time=1_000_000)


# Extended attributes


def with_attribute(line: Line, value: bytes | None) -> int:
    nodeid = write(line, "file")
    try:
        os.setxattr(line.path / "file", "user.probe", b"")
        if value is not None:
            os.setxattr(line.path / "file", "user.name", value)
    except OSError:
        pytest.skip("the temporary directory's file system has no user attributes")
    return nodeid


def setxattr_request(nodeid: int, flags: int) -> Request:
    return Request(Opcode.SETXATTR, nodeid, struct.pack("=IIII", 5, flags, 0, 0) + b"user.name\0value")


@case()
def setxattr_create(line: Line) -> Request:
    return setxattr_request(with_attribute(line, None), os.XATTR_CREATE)


@case(errno.EEXIST)
def setxattr_create_where_one_is(line: Line) -> Request:
    return setxattr_request(with_attribute(line, b"old"), os.XATTR_CREATE)


@case(errno.EEXIST)
def setxattr_create_where_the_same_is(line: Line) -> Request:
    return setxattr_request(with_attribute(line, b"value"), os.XATTR_CREATE)


@case()
def setxattr_replace(line: Line) -> Request:
    return setxattr_request(with_attribute(line, b"old"), os.XATTR_REPLACE)


@case(errno.ENODATA)
def setxattr_replace_of_nothing(line: Line) -> Request:
    return setxattr_request(with_attribute(line, None), os.XATTR_REPLACE)


@case()
def removexattr(line: Line) -> Request:
    return Request(Opcode.REMOVEXATTR, with_attribute(line, b"old"), b"user.name\0")


@case(errno.ENODATA)
def removexattr_of_nothing(line: Line) -> Request:
    return Request(Opcode.REMOVEXATTR, with_attribute(line, None), b"user.name\0")


# Opened


@case()
def opened(line: Line) -> Request:
    return Request(Opcode.OPEN, write(line, "file"), struct.pack("=II", os.O_RDWR, 0))


@case()
def opened_and_truncated(line: Line) -> Request:
    return Request(Opcode.OPEN, write(line, "file"), struct.pack("=II", os.O_RDWR | os.O_TRUNC, 0))


@case()
def opened_after_one_of_two_names_was_removed(line: Line) -> Request:
    """The descriptor may get the number of one that an earlier request has noted, and is of the same file."""
    request = unlink_of_one_of_two_names(line)
    line.answer(request)
    return Request(Opcode.OPEN, line.lookup(b"second"), struct.pack("=II", os.O_RDWR, 0))


@case()
def opendir(line: Line) -> Request:
    return Request(Opcode.OPENDIR, makedir(line, "dir"), bytes(8))


@case(again=errno.EBADF)
def release(line: Line) -> Request:
    nodeid = write(line, "file")
    return Request(Opcode.RELEASE, nodeid, struct.pack("=QIIQ", line.open(nodeid), 0, 0, 0))


# Looked up


@case()
def lookup(line: Line) -> Request:
    (line.path / "file").write_text("content")
    return Request(Opcode.LOOKUP, ROOT, b"file\0")


@case(known=True)
def lookup_of_a_further_name(line: Line) -> Request:
    write(line, "file")
    (line.path / ("x" * 250)).hardlink_to(line.path / "file")
    return Request(Opcode.LOOKUP, ROOT, b"x" * 250 + b"\0")


@case()
def lookup_where_another_file_is_now(line: Line) -> Request:
    write(line, "file")
    (line.path / "file").rename(line.path / "away")
    (line.path / "file").write_text("another")
    return Request(Opcode.LOOKUP, ROOT, b"file\0")


@case()
def readdirplus(line: Line) -> Request:
    for name in "abc":
        (line.path / name).write_text(name)
    handle = line.open(ROOT, os.O_DIRECTORY)
    return Request(Opcode.READDIRPLUS, ROOT, struct.pack("=QQIIQII", handle, 0, 4096, 0, 0, 0, 0))


@case()
def readdir_in_parts(line: Line) -> Request:
    for name in "abcdef":
        (line.path / name).write_text(name)
    handle = line.open(ROOT, os.O_DIRECTORY)
    return Request(Opcode.READDIR, ROOT, struct.pack("=QQIIQII", handle, 0, 80, 0, 0, 0, 0))


# The effects of a request, in a form in which two sources can be compared


class View:
    """What stands for inode numbers, which differ from source to source: where the file was at first, or is."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.names: dict[int, str] = {os.fstat(line.root).st_ino: "/"}
        self.learn()

    def learn(self) -> None:
        root = str(self.line.path)
        for directory, directories, files in os.walk(root):
            for name in sorted(directories + files):
                path = f"{directory}/{name}"
                self.names.setdefault(os.lstat(path).st_ino, path[len(root) :])

    def label(self, nodeid: int) -> str:
        inodes = self.line.context.inodes
        if not nodeid:
            return ""
        return self.names.get(inodes.get(nodeid).number, "unnamed") if nodeid in inodes else "gone"

    def of_answer(self, request: Request, reply: Reply) -> Any:
        if reply.error:
            return errno.errorcode[reply.error]
        if request.opcode in (Opcode.OPEN, Opcode.OPENDIR):
            handle, flags, backing = struct.unpack("=QIi", reply.payload)
            return self.of_handle(handle), flags, backing
        if request.opcode in (Opcode.READDIRPLUS, Opcode.READDIR):
            return len(reply.payload)
        if request.opcode is Opcode.SETATTR:
            return struct.unpack_from("=Q", reply.payload, 24), struct.unpack_from("=4I", reply.payload, 76)
        if len(reply.payload) < 128:
            return reply.payload
        nodeid = int.from_bytes(reply.payload[:8], "little")
        size, mode, nlink = (
            *struct.unpack_from("=Q", reply.payload, 48),
            *struct.unpack_from("=II", reply.payload, 100),
        )
        handle = ""
        if len(reply.payload) > 128:
            handle = self.of_handle(int.from_bytes(reply.payload[128:136], "little"))
        return self.label(nodeid), size, oct(mode), nlink, handle

    def of_handle(self, number: int) -> Any:
        """The file behind it must be its inode's, and open as asked for."""
        handle = self.line.context.handles.get(number)
        status = os.fstat(handle.descriptor)
        assert self.line.context.inodes.get(handle.nodeid).number == status.st_ino
        with open(f"/proc/self/fdinfo/{handle.descriptor}") as info:
            flags = next(one.split()[1] for one in info if one.startswith("flags:"))
        return self.label(handle.nodeid), oct(handle.flags), flags, stat.S_IFMT(status.st_mode)

    def of_source(self) -> Any:
        found = {}
        root = str(self.line.path)
        for directory, directories, files in os.walk(root):
            for name in directories + files:
                path = f"{directory}/{name}"
                status = os.lstat(path)
                data: Any = None
                if stat.S_ISREG(status.st_mode):
                    data = Path(path).read_bytes(), [(key, os.getxattr(path, key)) for key in os.listxattr(path)]
                elif stat.S_ISLNK(status.st_mode):
                    data = os.readlink(path)
                found[path[len(root) :]] = (
                    self.names[status.st_ino],
                    oct(status.st_mode),
                    (status.st_uid, status.st_gid),
                    status.st_nlink,
                    int(status.st_mtime) if status.st_mtime < _LONG_AGO else None,
                    data,
                )
        return found

    def of_table(self) -> Any:
        context = self.line.context
        label, known = self.label, context.inodes
        inodes = {}
        for nodeid in known:
            names = [(label(parent), name) for parent, name in known.names(known.get(nodeid))]
            assert len(names) == len(set(names))
            inodes[label(nodeid)] = (names[:1], set(names), known.lookups(nodeid))
        pins = sorted(label(nodeid) for nodeid in context.tree.directory_fds.pins)
        handles = sorted(str(self.of_handle(number)) for number in context.handles)
        snapshots = sum(handle.snapshot >= 0 for handle in map(context.handles.get, context.handles))
        return {"inodes": inodes, "pins": pins, "handles": handles, "snapshots": snapshots}

    def of_descriptors(self) -> int:
        self.line.context.tree.directory_fds.shrink()
        return len(self.line.extra_descriptors())

    def of_reachability(self) -> Any:
        """What the kernel can still do with all that it knows."""
        found = {}
        for nodeid in list(self.line.context.inodes):
            reply = self.line.answer(Request(Opcode.GETATTR, nodeid, bytes(16)))
            found[self.label(nodeid)] = reply.error, reply.payload[16 + 60 : 16 + 68]  # mode and nlink
        return found

    def of_everything(self, request: Request, reply: Reply) -> dict[str, Any]:
        self.learn()
        return {
            "answer": self.of_answer(request, reply),
            "source": self.of_source(),
            "table": self.of_table(),
            "descriptors": self.of_descriptors(),
            "reached": self.of_reachability(),
        }


_numbers = count()


class Lines:
    """Makes one mount after the other and closes the last one first."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def run(self, one: Case, *lives: Life) -> tuple[dict[str, Any], bool]:
        """Ask and let the fronts die of *lives*, each when the one before has; say what is there, and if all died."""
        os.umask(0o022)  # a killed front has left the umask of its caller
        with packet_pipe(8) as first, packet_pipe(8) as second:
            line = Line(self._directory / f"source-{next(_numbers)}", [first, second])
            try:
                request = one.make(line)
                view = View(line)
                if one.error:  # existing files must have an older time stamp than those that the request creates
                    now = time.time_ns()
                    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) <= now:
                        time.sleep(0.001)
                died = 0
                try:
                    line.ask(request, lives[0])
                    line.front.is_of(Life(None))
                except Killed:
                    died = 1
                unique = line.unique
                answered = unique in line.answers
                while died:
                    answered = unique in line.answers
                    try:
                        line.serve_resent(lives[died] if died < len(lives) else None)
                    except Killed:
                        died += 1
                    else:
                        line.front.is_of(Life(None))
                        break
                assert unique in line.answers, "it was not answered"
                found = view.of_everything(request, line.answers[unique])
                found["answered"] = answered
                return found, died == len(lives)
            finally:
                line.close()


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Lines]:
    gc.collect()  # objects of earlier tests must not close descriptors while this test counts them
    before = os.umask(0o022)
    yield Lines(tmp_path)
    os.umask(before)


@pytest.fixture(autouse=True)
def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.WARNING):
        yield
    assert caplog.records == []


def count_the_last(found: dict[str, Any], expected: dict[str, Any]) -> None:
    label = found["answer"][0]
    inodes, wanted = found["table"]["inodes"], expected["table"]["inodes"]
    if inodes[label][2] == wanted[label][2] - 1:
        inodes[label] = (*inodes[label][:2], wanted[label][2])


def compare(one: Case, found: dict[str, Any], expected: dict[str, Any], *steps: int) -> None:
    if one.known and found["answered"]:
        count_the_last(found, expected)
    if one.again and found["answer"] == errno.errorcode[one.again]:
        found["answer"] = expected["answer"]
    for what in ("answer", "source", "table", "descriptors", "reached"):
        assert found[what] == expected[what], f"{what} after a death at step {steps}"


@pytest.mark.parametrize("name", CASES)
def test_request_is_done_once_if_the_front_dies_at_any_step(name: str, lines: Lines) -> None:
    one = CASES[name]
    expected, _ = lines.run(one, Life(None))
    assert expected["answer"] == errno.errorcode[one.error] if one.error else not isinstance(expected["answer"], str)
    for steps in range(_MOST_STEPS):
        found, died = lines.run(one, Life(steps))
        compare(one, found, expected, steps)
        if not died:
            assert steps > 3, "hardly a step was seen"
            return
    raise AssertionError("it has no end")


@pytest.mark.parametrize("name", CASES)
def test_request_is_done_once_if_two_fronts_die(name: str, lines: Lines) -> None:
    one = CASES[name]
    expected, _ = lines.run(one, Life(None))
    choose = random.Random(name)
    for _ in range(12):
        steps = choose.randrange(40), choose.randrange(80)
        found, _ = lines.run(one, *map(Life, steps))
        compare(one, found, expected, *steps)


@pytest.mark.parametrize("kind", ["another user's", "fifo"])
def test_create_does_not_return_a_file_of_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The front dies before it creates the file, and the source gets a file with that name."""
    if kind != "fifo":
        if os.geteuid():
            pytest.skip("needs root")
        monkeypatch.setattr(killable_front, "ME", (4002, 4002))
    for steps in range(_MOST_STEPS):
        with packet_pipe(8) as first, packet_pipe(8) as second:
            line = Line(tmp_path / f"source-{steps}", [first, second])
            try:
                line.path.chmod(0o777)
                with pytest.raises(Killed):
                    line.ask(create_request(0), Life(steps))
                unique = line.unique
                if (line.path / "new").exists():
                    break
                if kind == "fifo":
                    os.mkfifo(line.path / "new")
                else:
                    (line.path / "new").write_text("secret")
                    (line.path / "new").chmod(0o600)
                line.serve_resent()
                assert line.answers[unique].error == errno.ESTALE, f"after a death at step {steps}"
            finally:
                line.close()
    assert steps > 3
