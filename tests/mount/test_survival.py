"""What a killed process of the server costs those who use the mount: what README's "When something dies" says, no more.

The workers' successors have to do what was begun, once and not twice, and the front's have to refuse it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.as_user import MYSELF, Caller, Child, run_as
from tests.conftest import Serve
from tests.expect import fails, outcome
from tests.mirror import Mirror
from tests.server_processes import wait_until
from tests.syscalls import opened

pytestmark = [pytest.mark.mounted, pytest.mark.user, pytest.mark.by_workers]

STRANGER = Caller(4001, 4001)
# More than the front does by itself.
LARGE = 200_000
DEATH_OF_A_WORKER = r"llloop-worker-\d+ was killed by signal 9"
DEATH_OF_THE_FRONT = "llloop-front was killed by signal 9"


def process_ids(mirror: Mirror, role: str) -> list[int]:
    """The living processes of this title; one that was just forked has none yet."""
    found = []
    for pid in mirror.processes():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"llloop-{role}".encode()):
                found.append(pid)
    return found


def kill(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def requests_with_workers(mirror: Mirror) -> int:
    """How many requests the workers have in hand, as the front reports it on demand."""
    reports = r"(\d+) of \d+ slots lent"
    before = len(re.findall(reports, mirror.log.read_text()))
    os.kill(mirror.pid, signal.SIGUSR1)
    assert wait_until(lambda: len(re.findall(reports, mirror.log.read_text())) > before), mirror.all_output()
    return int(re.findall(reports, mirror.log.read_text())[-1])


def direct_read(fd: int, size: int, offset: int) -> bytes:
    with mmap.mmap(-1, size) as memory:
        count = os.preadv(fd, [memory], offset)
        return memory[:count]


@pytest.mark.at_once("a collected write does not wait for its answer")
@pytest.mark.own_loop
@pytest.mark.parametrize("fate", ["goes on", "is killed"])
def test_a_dead_front_s_request_reaches_no_other_file(serve: Serve, fate: str) -> None:
    """Descriptors in the new front have the old one's numbers: a worker that trusted them would write elsewhere."""
    mirror = serve("--workers", "1")
    if "has_resend" not in mirror.output.read_text():
        pytest.skip("this kernel does not send a dead front's requests again (Linux 6.9): the writer would wait")
    mirror.expect_log(DEATH_OF_THE_FRONT)
    if fate == "is killed":
        mirror.expect_log(DEATH_OF_A_WORKER)
    (front,), (worker,) = process_ids(mirror, "front"), process_ids(mirror, "worker")
    others = [f"other{number}" for number in range(8)]
    descriptors = [os.open(mirror.mountpoint / "file", os.O_RDWR | os.O_CREAT)]
    try:
        os.kill(worker, signal.SIGSTOP)
        writing = Child(outcome, os.pwrite, descriptors[0], b"A" * LARGE, 0)
        try:
            assert wait_until(lambda: requests_with_workers(mirror) == 1)
            kill(front)
            assert wait_until(lambda: process_ids(mirror, "front") not in ([], [front]))
            for name in others:
                descriptors.append(os.open(mirror.mountpoint / name, os.O_RDWR | os.O_CREAT))
                os.pwrite(descriptors[-1], b"precious", 0)
        finally:
            os.kill(worker, signal.SIGCONT if fate == "goes on" else signal.SIGKILL)
        assert writing.result() == LARGE
        # The worker takes one request after the other: whatever it did of the old one is done when this is.
        (mirror.mountpoint / "late").write_bytes(b"B" * LARGE)
        assert (mirror.source / "late").read_bytes() == b"B" * LARGE
        assert {(mirror.source / name).read_bytes()[:10] for name in others} == {b"precious"}
        assert (mirror.source / "file").read_bytes() == b"A" * LARGE
        assert os.pread(descriptors[0], 10, 0) == b"A" * 10
    finally:
        for fd in descriptors:
            with contextlib.suppress(OSError):
                os.close(fd)


def test_nothing_outlives_the_supervisor(serve: Serve) -> None:
    """Acting for another user makes the kernel forget that a process wanted to die with its parent."""
    mirror = serve("--workers", "2")
    mirror.source.chmod(0o777)

    def make_files(directory: Path) -> None:
        os.mkdir(directory / "directory")
        for number in range(8):
            (directory / f"{number}").write_bytes(b"small")
            (directory / f"{number}").write_bytes(bytes(LARGE))

    run_as(STRANGER if os.geteuid() == 0 else MYSELF, make_files, mirror.mountpoint)
    assert mirror.process
    try:
        kill(mirror.pid)
        mirror.process.wait(10)
        mirror.expect_log("the supervisor has died; .* was detached")
        assert wait_until(lambda: mirror.processes() == []), mirror.processes()
        assert wait_until(lambda: not mirror.mounted()), "the mount is left behind"
        assert os.listdir(mirror.mountpoint) == []
        assert all((mirror.source / f"{number}").read_bytes() == bytes(LARGE) for number in range(8))
    finally:
        mirror.clean_up()
    assert not mirror.mounted()


def write_and_verify(directory: Path, number: int, finish: Path) -> tuple[bytes, bytes]:
    """Random writes, appends and reads until told to finish; returns what the two files must hold."""
    choose = random.Random(number)
    size = 1 << 20
    expected, appended = bytearray(size), bytearray()
    path, log = directory / f"random{number}", directory / f"appended{number}"
    path.write_bytes(expected)
    with (
        opened(path, os.O_RDWR) as fd,
        opened(log, os.O_RDWR | os.O_CREAT | os.O_APPEND) as appending,
    ):
        while not finish.exists():
            for _ in range(4):
                offset, length = choose.randrange(size), choose.randrange(1, 300_000)
                piece = choose.randbytes(min(length, size - offset))
                assert os.pwrite(fd, piece, offset) == len(piece)
                expected[offset : offset + len(piece)] = piece
            offset, length = choose.randrange(size), choose.randrange(1, 300_000)
            assert os.pread(fd, length, offset) == expected[offset : offset + length], f"read at {offset}"
            if len(appended) < 8 << 20:
                piece = choose.randbytes(choose.randrange(1, 100_000))
                assert os.write(appending, piece) == len(piece)
                appended += piece
            os.fsync(fd)
            assert os.fstat(appending).st_size == len(appended)
        assert os.pread(appending, 9 << 20, 0) == appended
    return bytes(expected), bytes(appended)


def result_or_failure(child: Child[Any]) -> Any:
    """For every child to be waited for, also if the first one failed: what is left would keep the mount busy."""
    try:
        return child.result()
    except (AssertionError, OSError) as error:
        return error


@pytest.mark.parametrize("how", ["one after the other", "all at once"])
def test_workers_killed_under_load_lose_and_repeat_nothing(serve: Serve, tmp_path: Path, how: str) -> None:
    mirror = serve("--workers", "2", "--cache", "never")
    mirror.expect_log(DEATH_OF_A_WORKER)
    finish = tmp_path / "finish"
    children = [Child(write_and_verify, mirror.mountpoint, number, finish) for number in range(3)]
    killed: set[int] = set()
    try:
        choose = random.Random(how)
        for _ in range(5):
            fresh: list[int] = []

            def all_are_there() -> bool:
                fresh[:] = [pid for pid in process_ids(mirror, "worker") if pid not in killed]  # noqa: B023
                return len(fresh) == 2  # noqa: B023

            assert wait_until(all_are_there), mirror.all_output()
            time.sleep(choose.uniform(0.05, 0.2))
            victims = fresh if how == "all at once" else [choose.choice(fresh)]
            kill(*victims)
            killed.update(victims)
    finally:
        finish.touch()
        results = [result_or_failure(child) for child in children]
    assert len(killed) >= 5
    for number, result in enumerate(results):
        assert isinstance(result, tuple), f"process {number} failed with {result}"
        # Not compared by assert itself, which would print megabytes.
        same = [
            (mirror.source / name).read_bytes() == content
            for name, content in zip((f"random{number}", f"appended{number}"), result, strict=True)
        ]
        assert same == [True, True], f"process {number}: {same}"


def test_a_worker_killed_with_requests_in_hand(serve: Serve) -> None:
    """It has been told of them and has done none: the next one has to do them all, and appends only once."""
    mirror = serve("--workers", "1", "--cache", "never")
    mirror.expect_log(DEATH_OF_A_WORKER)
    (worker,) = process_ids(mirror, "worker")
    content = random.Random(1).randbytes(LARGE)
    (mirror.source / "there").write_bytes(content)
    descriptors: list[int] = []

    def open_one(name: str, flags: int) -> int:
        descriptors.append(os.open(mirror.mountpoint / name, flags | os.O_CREAT))
        return descriptors[-1]

    # Each of another file: the kernel would hold back a second write to the same one.
    requests: list[tuple[Callable[..., Any], tuple[Any, ...], Any]] = [
        (os.pwrite, (open_one("written", os.O_WRONLY), content, 5_000), LARGE),
        (os.write, (open_one("appended", os.O_WRONLY | os.O_APPEND), content), LARGE),
        (os.write, (open_one("synchronous", os.O_WRONLY | os.O_SYNC), content), LARGE),
        (os.pread, (open_one("there", os.O_RDONLY), LARGE, 0), content),
        (os.fsync, (open_one("synced", os.O_WRONLY),), None),
    ]
    try:
        os.kill(worker, signal.SIGSTOP)
        children = [Child(outcome, function, *arguments) for function, arguments, _ in requests]
        try:
            if mirror.via == "own":
                # Where a user's pipes are small (pipe(7)), the front keeps some of them.
                small = "pipes hold fewer" in mirror.log.read_text()
                assert wait_until(lambda: requests_with_workers(mirror) >= (1 if small else len(requests)))
            else:
                time.sleep(0.5)  # through the fallback there is one at a time
        finally:
            kill(worker)
        assert [child.result() for child in children] == [expected for _, _, expected in requests]
    finally:
        for fd in descriptors:
            os.close(fd)
    assert (mirror.source / "written").read_bytes() == bytes(5_000) + content
    assert (mirror.source / "appended").read_bytes() == content
    assert (mirror.source / "synchronous").read_bytes() == content


@pytest.mark.own_loop
def test_without_a_keeper_open_files_are_opened_again_by_name(serve: Serve) -> None:
    """On kinds of machines for which nobody has looked up how to clone, and where keeper and front both die."""
    program = "import platform; platform.machine = lambda: 'vax'; from llloop.cli import main; main()"
    mirror = serve("--workers", "1", command=[sys.executable, "-c", program, "serve"])
    if "has_resend" not in mirror.output.read_text():
        pytest.skip("this kernel does not send a dead front's requests again (Linux 6.9)")
    mirror.expect_log(DEATH_OF_THE_FRONT)
    mirror.expect_log("a file that was open when the front died is lost to its user")
    with (
        opened(mirror.mountpoint / "file", os.O_RDWR | os.O_CREAT) as file,
        opened(mirror.mountpoint / "gone", os.O_RDWR | os.O_CREAT) as gone,
    ):
        os.pwrite(file, b"before", 0)
        os.pwrite(gone, b"before", 0)
        os.unlink(mirror.mountpoint / "gone")
        (front,) = process_ids(mirror, "front")
        kill(front)
        assert os.pwrite(file, LARGE * b"a", 6) == LARGE
        with fails(errno.EBADF):
            os.pwrite(gone, LARGE * b"a", 6)
    assert (mirror.source / "file").read_bytes() == b"before" + LARGE * b"a"
