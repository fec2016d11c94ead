"""flock and fcntl locks between processes of the mount."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.expect import fails, start_python
from tests.server import Tree
from tests.syscalls import opened

# struct flock of 64-bit Linux: type, whence, start, length, pid.
FLOCK = struct.Struct("hhqqi4x")

LOCKER = """
import errno, fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
kinds = {"sh": fcntl.LOCK_SH, "ex": fcntl.LOCK_EX, "un": fcntl.LOCK_UN}
for line in sys.stdin:
    how, kind, *rest = line.split()
    flags = kinds[kind] | (0 if "wait" in rest or kind == "un" else fcntl.LOCK_NB)
    numbers = [int(word) for word in rest if word != "wait"]
    try:
        if how == "flock":
            fcntl.flock(fd, flags)
        else:
            fcntl.lockf(fd, flags, *numbers)
        print("done", flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""


class Other:
    """Another process that locks the same file on request."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def start(self, request: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def ask(self, request: str) -> str:
        self.start(request)
        return self.answer()


@contextmanager
def other_process(tree: Tree, name: str = "file") -> Iterator[Other]:
    process = start_python(LOCKER, tree.mnt / name)
    try:
        yield Other(process)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", ["flock", "lockf"])
def test_exclusive_and_shared(tree: Tree, how: str) -> None:
    (tree.mnt / "file").write_bytes(b"x" * 100)
    lock = getattr(fcntl, how)
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor, other_process(tree) as other:
        lock(descriptor, fcntl.LOCK_EX)
        assert other.ask(f"{how} sh") == other.ask(f"{how} ex") == "EAGAIN"
        lock(descriptor, fcntl.LOCK_SH)
        assert other.ask(f"{how} ex") == "EAGAIN"
        assert other.ask(f"{how} sh") == "done"
        with fails(errno.EAGAIN):
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert other.ask(f"{how} un") == "done"
        lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock(descriptor, fcntl.LOCK_UN)
        assert other.ask(f"{how} ex") == "done"
        with fails(errno.EAGAIN):
            lock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


@pytest.mark.parametrize("how", ["flock", "lockf"])
def test_waiting_for_a_lock(tree: Tree, how: str) -> None:
    (tree.mnt / "file").touch()
    lock = getattr(fcntl, how)
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor, other_process(tree) as other:
        lock(descriptor, fcntl.LOCK_EX)
        other.start(f"{how} ex wait")
        time.sleep(0.3)
        # A process that waits must not block other users of the file.
        os.pwrite(descriptor, b"meanwhile", 0)
        assert os.pread(descriptor, 100, 0) == b"meanwhile"
        before = time.monotonic()
        lock(descriptor, fcntl.LOCK_UN)
        assert other.answer() == "done"
        assert time.monotonic() - before < 20
        with fails(errno.EAGAIN):
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("how", ["flock", "lockf"])
def test_locks_are_released_at_close_and_death(tree: Tree, how: str) -> None:
    (tree.mnt / "file").touch()
    lock = getattr(fcntl, how)
    with other_process(tree) as other:
        with opened(tree.mnt / "file", os.O_RDWR) as descriptor:
            lock(descriptor, fcntl.LOCK_EX)
            assert other.ask(f"{how} ex") == "EAGAIN"
        assert other.ask(f"{how} ex") == "done"
        with opened(tree.mnt / "file", os.O_RDWR) as descriptor:
            with fails(errno.EAGAIN):
                lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            other.process.kill()
            other.process.wait()
            lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_ranges(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"x" * 100)
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor, other_process(tree) as other:
        fcntl.lockf(descriptor, fcntl.LOCK_EX, 10, 20)
        assert other.ask("lockf ex 20 0") == "done"
        assert other.ask("lockf ex 1 30") == "done"
        assert other.ask("lockf ex 1 29") == "EAGAIN"
        assert other.ask("lockf sh 11 10") == "EAGAIN"
        assert other.ask("lockf ex 0 30") == "done"
        with fails(errno.EAGAIN):
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 5 * 1024**3)
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 5, 22)
        assert other.ask("lockf ex 5 22") == "done"
        assert other.ask("lockf ex 1 21") == "EAGAIN"


def test_getlk_reports_the_holder(tree: Tree) -> None:
    (tree.mnt / "file").write_bytes(b"x" * 100)
    with opened(tree.mnt / "file", os.O_RDWR) as descriptor, other_process(tree) as other:
        assert other.ask("lockf ex 10 20") == "done"
        asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, start, length, pid = FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
        assert (kind, start, length, pid) == (fcntl.F_WRLCK, 20, 10, other.process.pid)
        assert other.ask("lockf un") == "done"
        kind, *_ = FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
        assert kind == fcntl.F_UNLCK


def test_locks_of_the_open_file_description(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    set_lock, asked = 37, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with opened(tree.mnt / "file", os.O_RDWR) as first:
        with opened(tree.mnt / "file", os.O_RDWR) as second:
            fcntl.fcntl(first, set_lock, asked)
            with fails(errno.EAGAIN):
                fcntl.fcntl(second, set_lock, asked)
        # Unlike a process lock, closing another descriptor does not release it.
        with opened(tree.mnt / "file", os.O_RDWR) as third, fails(errno.EAGAIN):
            fcntl.fcntl(third, set_lock, asked)


def test_lock_applies_to_both_names_of_a_file(tree: Tree) -> None:
    (tree.mnt / "file").touch()
    os.link(tree.mnt / "file", tree.mnt / "second")
    with opened(tree.mnt / "second", os.O_RDWR) as descriptor, other_process(tree) as other:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert other.ask("flock ex") == "EAGAIN"
        os.unlink(tree.mnt / "second")
        os.rename(tree.mnt / "file", tree.mnt / "renamed")
        assert other.ask("flock ex") == "EAGAIN"
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        assert other.ask("flock ex") == "done"


def test_directories_can_be_locked(tree: Tree) -> None:
    with opened(tree.mnt, os.O_RDONLY) as first, opened(tree.mnt, os.O_RDONLY) as second:
        fcntl.flock(first, fcntl.LOCK_EX)
        with fails(errno.EAGAIN):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(first, fcntl.LOCK_UN)
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_counter_shared_by_processes(tree: Tree) -> None:
    (tree.mnt / "counter").write_text("0")
    script = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for _ in range(200):
    fcntl.flock(fd, fcntl.LOCK_EX)
    value = int(os.pread(fd, 20, 0))
    os.pwrite(fd, b"%d" % (value + 1), 0)
    fcntl.flock(fd, fcntl.LOCK_UN)
"""
    counting = [start_python(script, tree.mnt / "counter") for _ in range(3)]
    for process in counting:
        process.communicate(timeout=40)
        assert process.returncode == 0
    assert (tree.src / "counter").read_text() == "600"
