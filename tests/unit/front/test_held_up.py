"""A front with system calls that block: it keeps serving, and each blocked request is done once and answered."""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llloop.front.inodes import ROOT
from llloop.linux import syscalls
from llloop.linux.fuse import Opcode
from llloop.linux.syscalls import is_readable
from llloop.shared.leadership import MAX_THREADS
from tests.server_processes import wait_until
from tests.unit.killable_front import PROBE, Life, Line, Request, line_of_fronts

TIMEOUT = 10.0


class BlockedCall:
    """A system call that blocks until `release`."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._gate = threading.Event()
        self.waiting = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.waiting += 1
        assert self._gate.wait(TIMEOUT)
        return self._call(*arguments, **options)

    def release(self) -> None:
        self._gate.set()


class Served:
    """A front that serves in a thread."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self._thread = threading.Thread(target=line.front.loop.run)
        self._thread.start()

    def send(self, *requests: Request) -> list[int]:
        uniques = []
        for request in requests:
            self.line.unique += 2
            self.line.unanswered[self.line.unique] = request
            self.line.kernel.send(request.packed(self.line.unique))
            uniques.append(self.line.unique)
        return uniques

    def has_answered(self, *uniques: int) -> bool:
        self.line.collect()
        return all(unique in self.line.answers for unique in uniques)

    def answers(self, *requests: Request) -> None:
        """Whether it answers these, whatever else waits."""
        uniques = self.send(*requests)
        assert wait_until(lambda: self.has_answered(*uniques))

    def end(self) -> None:
        self.line.unmount()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with line_of_fronts(tmp_path, count=2 * MAX_THREADS) as own:
        yield own


def mkdir(name: str, umask: int = 0o022) -> Request:
    return Request(Opcode.MKDIR, ROOT, struct.pack("=II", 0o777, umask) + name.encode() + b"\0")


def lookup(name: str) -> Request:
    return Request(Opcode.LOOKUP, ROOT, name.encode() + b"\0")


def test_blocked_change_does_not_block_other_requests(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    (line.path / "there").touch()
    held = BlockedCall(os.mkdir)
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", held)
        served = Served(line)
        waiting = served.send(mkdir("first", 0o077), mkdir("second", 0o027))
        assert wait_until(lambda: held.waiting == 2)
        served.answers(lookup("there"), PROBE, Request(Opcode.UNLINK, ROOT, b"there\0"))
        assert not (line.path / "there").exists()
        assert not served.has_answered(waiting[0])
        held.release()
        assert wait_until(lambda: served.has_answered(*waiting))
    served.answers(mkdir("third"))
    served.end()
    assert all(reply.error == 0 or reply.error == errno.ENOENT for reply in line.answers.values())
    modes = [(line.path / name).stat().st_mode & 0o777 for name in ("first", "second", "third")]
    assert modes == [0o700, 0o750, 0o755], "each thread has a umask of its own"
    assert not any(line.slots.states), "the slots of what was held up are free again"


def test_last_close_of_a_removed_file_does_not_block(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    (line.path / "large").touch()
    nodeid = line.lookup(b"large")
    line.answer(Request(Opcode.UNLINK, ROOT, b"large\0"))
    (pin,) = line.context.tree.directory_fds.pins.descriptors()
    closed = []
    gate = threading.Event()
    close = os.close

    def held(fd: int) -> None:
        if fd == pin:
            closed.append(fd)
            assert gate.wait(TIMEOUT)
        close(fd)

    monkeypatch.setattr(os, "close", held)
    served = Served(line)
    line.kernel.send(Request(Opcode.FORGET, nodeid, struct.pack("=Q", 1)).packed(0))
    assert wait_until(lambda: closed == [pin])
    served.answers(PROBE, mkdir("directory"))
    gate.set()
    assert wait_until(lambda: line.context.leadership.stalled == 0)
    served.end()
    assert line.extra_descriptors() == set()


def test_thread_that_hands_its_request_to_a_worker_frees_no_slot_of_another_thread(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot that was free when the thread handed its own slot over can hold another request before it leaves."""
    (line.path / "file").touch()
    nodeid = line.lookup(b"file")
    line.open(nodeid)
    monkeypatch.setattr(line.context.router, "is_unanswered", lambda given: True)  # so that a worker answers SETATTR
    chmod, mkdir_call = BlockedCall(os.fchmod), BlockedCall(os.mkdir)
    reader, writer = os.pipe()
    close, closing, gate = os.close, threading.Event(), threading.Event()

    def held_close(fd: int) -> None:
        if fd == writer:
            closing.set()
            assert gate.wait(TIMEOUT)
        close(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fchmod", chmod)
        patch.setattr(os, "mkdir", mkdir_call)
        patch.setattr(os, "close", held_close)
        served = Served(line)
        served.send(Request(Opcode.SETATTR, nodeid, struct.pack("=II6Q8I", 1, *(0,) * 10, 0o600, *(0,) * 4)))
        leadership = line.context.leadership
        assert wait_until(lambda: chmod.waiting == 1 and leadership.stalled == 1)
        line.context.closing.append(writer)
        chmod.release()
        assert closing.wait(TIMEOUT)
        (made,) = served.send(mkdir("made"))
        assert wait_until(lambda: mkdir_call.waiting == 1 and leadership.stalled == 2)
        held_state = max(line.slots.states)
        gate.set()
        assert wait_until(lambda: leadership.stalled == 1)
        assert bytes(line.slots.states).count(held_state) == 1, "the slot of the mkdir is in use"
        mkdir_call.release()
        assert wait_until(lambda: served.has_answered(made))
    served.end()
    close(reader)


def test_last_thread_postpones_changes_and_serves_the_rest(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    (line.path / "there").touch()
    held = BlockedCall(os.mkdir)
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", held)
        served = Served(line)
        many = MAX_THREADS + 5
        waiting = []
        for number in range(many):
            waiting += served.send(mkdir(f"directory{number}"))
            if number < MAX_THREADS - 1:
                assert wait_until(lambda: held.waiting == number + 1)  # noqa: B023
        assert wait_until(lambda: not is_readable(line.device, 0)), "not all are taken"
        served.answers(PROBE, lookup("there"))
        held.release()
        assert wait_until(lambda: served.has_answered(*waiting))
    served.end()
    assert [line.answers[unique].error for unique in waiting] == [0] * many
    assert len(list(line.path.iterdir())) == many + 1
    assert not any(line.slots.states)


def test_several_changes_of_a_dead_front_are_done_once(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls were made, but none was answered."""
    made: list[tuple[Any, ...]] = []

    def mkdir_and_die(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        made.append(arguments)
        threading.Event().wait()

    real = os.mkdir
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", mkdir_and_die)
        front = line.front
        threading.Thread(target=front.loop.run, daemon=True).start()
        served = object.__new__(Served)
        served.line = line
        for number in range(3):
            waiting = served.send(mkdir(f"directory{number}"))
            assert wait_until(lambda: len(made) == number + 1)  # noqa: B023
        served.answers(PROBE)
        assert waiting
    # Its threads wait forever, like those of a killed process. One still reads from the device.
    line.replace_device()
    line.serve_resent(Life(None))
    errors = [reply.error for unique, reply in line.answers.items()]
    assert errors.count(errno.EEXIST) == 0
    assert sorted(path.name for path in line.path.iterdir()) == ["directory0", "directory1", "directory2"]
    assert not line.unanswered


def test_change_delayed_before_its_call_uses_the_right_file(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("meant", "other"):
        (line.path / name).touch(0o644)
    nodeid, other = line.lookup(b"meant"), line.lookup(b"other")
    handle = line.open(nodeid)
    held = BlockedCall(os.fchmod)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fchmod", held)
        served = Served(line)
        change = struct.pack("=II6Q3I5I", 1, 0, *[0] * 6, *[0] * 3, 0o600, *[0] * 4)  # FATTR_MODE
        waiting = served.send(Request(Opcode.SETATTR, nodeid, change))
        assert wait_until(lambda: held.waiting == 1)
        served.answers(Request(Opcode.RELEASE, nodeid, struct.pack("=QIIQ", handle, os.O_RDWR, 0, 0)))
        served.answers(Request(Opcode.OPEN, other, struct.pack("=II", os.O_RDWR, 0)))
        held.release()
        assert wait_until(lambda: served.has_answered(*waiting))
    served.end()
    assert line.answers[waiting[0]].error == 0
    modes = [(line.path / name).stat().st_mode & 0o777 for name in ("meant", "other")]
    assert modes == [0o600, 0o644]
    assert line.context.closing == []


@pytest.mark.parametrize("why", ["no space", "forgotten"])
def test_descriptor_of_a_blocked_call_is_not_closed(line: Line, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """The call blocks before the kernel looks up the descriptor, whose number could be reused."""
    for name in ("removed", "other"):
        (line.path / name).touch(0o644)
    nodeid, other = line.lookup(b"removed"), line.lookup(b"other")
    line.answer(Request(Opcode.UNLINK, ROOT, b"removed\0"))
    (pin,) = line.context.tree.directory_fds.pins.descriptors()
    held = BlockedCall(syscalls.chmod)
    full = iter([OSError(errno.ENOSPC, "full")])
    real = os.mkdir

    def fill_up(*arguments: Any, **options: Any) -> None:
        for error in full:
            raise error
        real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(syscalls, "chmod", held)
        patch.setattr(os, "mkdir", fill_up)
        served = Served(line)
        change = struct.pack("=II6Q3I5I", 1, 0, *[0] * 6, *[0] * 3, 0o600, *[0] * 4)  # FATTR_MODE
        waiting = served.send(Request(Opcode.SETATTR, nodeid, change))
        assert wait_until(lambda: held.waiting == 1)
        if why == "no space":
            served.answers(mkdir("directory"))
        else:
            line.kernel.send(Request(Opcode.FORGET, nodeid, struct.pack("=Q", 1)).packed(0))
        for _ in range(5):
            served.answers(Request(Opcode.OPEN, other, struct.pack("=II", os.O_RDONLY, 0)))
        assert os.fstat(pin).st_nlink == 0, "its number is another file's"
        held.release()
        assert wait_until(lambda: served.has_answered(*waiting))
        served.answers(PROBE)
    served.end()
    assert (line.path / "other").stat().st_mode & 0o777 == 0o644
    assert line.context.closing == []
    assert pin not in line.extra_descriptors()


def send(line: Line, request: Request) -> int:
    """Send a request that no front has received yet, and return its number."""
    line.unique += 2
    line.unanswered[line.unique] = request
    line.kernel.send(request.packed(line.unique))
    return line.unique


def test_first_request_after_the_death_of_a_front_blocks_no_others(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = BlockedCall(os.mkdir)
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", blocked)
        line.next_front(Life(None))
        first = send(line, mkdir("first"))
        line.front.loop.serve_resent()
        served = Served(line)
        assert wait_until(lambda: blocked.waiting == 1)
        served.answers(PROBE)
        assert not served.has_answered(first)
        blocked.release()
        assert wait_until(lambda: served.has_answered(first))
    served.end()
    assert (line.path / "first").is_dir()


def test_closing_what_a_dead_front_left_open_blocks_no_others(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    (line.path / "file").touch()
    orphan = os.open(line.path / "file", os.O_RDWR)
    closed = []
    gate = threading.Event()
    close = os.close

    def blocked(fd: int) -> None:
        if fd == orphan:
            closed.append(fd)
            assert gate.wait(TIMEOUT)
        close(fd)

    monkeypatch.setattr(os, "close", blocked)
    line.next_front(Life(None))
    first = send(line, PROBE)
    line.front.loop.serve_resent()
    served = Served(line)
    assert wait_until(lambda: closed == [orphan])
    served.answers(PROBE)
    assert served.has_answered(first)
    gate.set()
    assert wait_until(lambda: line.context.leadership.stalled == 0)
    served.end()
    assert line.extra_descriptors() == set()
