"""The effects of a killed process on users of the mount, as documented."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.as_user import MYSELF, Caller, Child, run_as
from tests.conftest import Serve
from tests.expect import fails, outcome
from tests.filesystems import make_image, mounted, tmpfs
from tests.kernel_caches import forget_unused
from tests.server import Server
from tests.server_processes import descriptors as descriptors_of
from tests.server_processes import (
    front_report,
    is_replaced,
    private_memory,
    process_ids,
    stop_process,
    titles,
    wait_until,
)
from tests.syscalls import opened

pytestmark = [pytest.mark.mounted, pytest.mark.user]

STRANGER = Caller(4001, 4001)
# The front gives a write of this size to a worker.
LARGE = 200_000
DEATH_OF_A_WORKER = r"llloop-worker-\d+ was killed by signal 9"
DEATH_OF_THE_FRONT = "llloop-front was killed by signal 9"


def kill(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def requests_with_workers(server: Server) -> int:
    """How many requests the workers have in hand, as the front reports it on demand."""
    return front_report(server).slots


def direct_read(fd: int, size: int, offset: int) -> bytes:
    with mmap.mmap(-1, size) as memory:
        count = os.preadv(fd, [memory], offset)
        return memory[:count]


@pytest.fixture
def resending(serve: Serve) -> Callable[..., Server]:
    """Mounts whose kernel sends a dead front's requests again."""

    def start(*arguments: str) -> Server:
        server = serve(*arguments)
        if "has_resend" not in server.output.read_text():
            pytest.skip("this kernel does not send a dead front's requests again (Linux 6.9)")
        return server

    return start


def replace_front(server: Server) -> None:
    """Kill the front and wait until another is there."""
    (front,) = process_ids(server, "front")
    kill(front)
    assert is_replaced(server, "front", front), server.all_output()


@pytest.mark.at_once("a collected write does not wait for its answer")
@pytest.mark.own_loop
@pytest.mark.by_workers
@pytest.mark.parametrize("fate", ["goes on", "is killed"])
@pytest.mark.parametrize("deaths", [1, 5])
def test_request_of_a_dead_front_reaches_its_file(resending: Callable[..., Server], fate: str, deaths: int) -> None:
    """A worker has the request and is stopped while more fronts die than one request may kill."""
    # Programs must not look up names meanwhile, because they would get no answer.
    server = resending("--workers", "1", "--metadata", "front")
    server.expect_log(DEATH_OF_THE_FRONT)
    if fate == "is killed":
        server.expect_log(DEATH_OF_A_WORKER)
    (worker,) = process_ids(server, "worker")
    others = [f"other{number}" for number in range(8)]
    descriptors = [os.open(server.mountpoint / name, os.O_RDWR | os.O_CREAT) for name in ("file", "log")]
    log = os.open(server.mountpoint / "log", os.O_WRONLY | os.O_APPEND)
    descriptors.append(log)
    try:
        stop_process(worker)
        writing = Child(outcome, os.pwrite, descriptors[0], b"A" * LARGE, 0)
        appending = Child(outcome, os.write, log, b"L" * LARGE)
        try:
            assert wait_until(lambda: requests_with_workers(server) == 2)
            for _ in range(deaths):
                replace_front(server)
                # Wait until the next front serves, so that it does not die during its start.
                assert os.listdir(server.mountpoint)
            for name in others:
                descriptors.append(os.open(server.mountpoint / name, os.O_RDWR | os.O_CREAT))
                os.pwrite(descriptors[-1], b"precious", 0)
        finally:
            os.kill(worker, signal.SIGCONT if fate == "goes on" else signal.SIGKILL)
        assert (writing.result(), appending.result()) == (LARGE, LARGE)
        # The worker does one request after the other. When this one is done, the old one is done, too.
        (server.mountpoint / "late").write_bytes(b"B" * LARGE)
        assert (server.source / "late").read_bytes() == b"B" * LARGE
        assert {(server.source / name).read_bytes() for name in others} == {b"precious"}
        assert (server.source / "file").read_bytes() == b"A" * LARGE
        assert (server.source / "log").stat().st_size == LARGE, "appended more than once"
        assert os.pread(descriptors[0], 10, 0) == b"A" * 10
    finally:
        for fd in descriptors:
            os.close(fd)


@pytest.mark.own_loop
def test_keeper_and_front_die_in_turn(resending: Callable[..., Server]) -> None:
    """Unlinked open files pass from one to the other and back."""
    server = resending("--workers", "1")
    server.expect_log(DEATH_OF_THE_FRONT)
    server.expect_log("llloop-keeper was killed by signal 9")
    path = server.mountpoint / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.unlink(path)
        for number in range(3):
            (keeper,), (front,) = process_ids(server, "keeper"), process_ids(server, "front")
            kill(keeper)
            assert is_replaced(server, "front", front)
            assert os.pwrite(fd, bytes([number]) * LARGE, number * LARGE) == LARGE
            replace_front(server)
            assert os.fstat(fd).st_size == (number + 1) * LARGE
        assert os.pread(fd, 4 * LARGE, 0) == b"".join(bytes([number]) * LARGE for number in range(3))


@pytest.mark.own_loop
@pytest.mark.timeout(120)
def test_fronts_that_die_immediately(resending: Callable[..., Server]) -> None:
    """Each is killed as soon as it appears. The pauses before a new front grow; each length is logged once."""
    server = resending("--workers", "1")
    server.expect_log(DEATH_OF_THE_FRONT)
    server.expect_log("llloop-front was killed by signal 9 again; the next try is in", required=False)
    path = server.mountpoint / "file"
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
        os.unlink(path)
        working = Child(make_and_remove, server.mountpoint, 40)
        killed: set[int] = set()
        while len(killed) < 14:
            fresh = [pid for pid in process_ids(server, "front") if pid not in killed]
            kill(*fresh)
            killed.update(fresh)
        assert working.result() == 40
        assert os.pwrite(fd, b"still there", 0) == 11
        assert os.pread(fd, 20, 0) == b"still there"


def make_and_remove(directory: Path, times: int) -> int:
    for number in range(times):
        os.mkdir(directory / f"{number}")
        (directory / f"{number}" / "file").write_bytes(b"content")
        os.rename(directory / f"{number}", directory / f"renamed-{number}")
        os.unlink(directory / f"renamed-{number}" / "file")
        os.rmdir(directory / f"renamed-{number}")
    return times


@pytest.mark.own_loop
@pytest.mark.by_workers
def test_stopped_worker_does_not_block_other_shards(serve: Serve) -> None:
    server = serve("--workers", "4", "--cache", "never", "--metadata", "front")
    stopped, *_ = process_ids(server, "worker")
    files = [server.mountpoint / f"{number}" for number in range(24)]
    for path in files:
        path.touch()
    stop_process(stopped)
    try:
        children = [Child(outcome, path.write_bytes, b"x" * LARGE) for path in files]
        # The stopped worker has about a quarter of the files.
        assert wait_until(lambda: sum(child.is_done() for child in children) >= 8), server.all_output()
        waiting = sum(not child.is_done() for child in children)
        os.mkdir(server.mountpoint / "directory")
        assert len(os.listdir(server.mountpoint)) == len(files) + 1
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert [child.result() for child in children] == [LARGE] * len(files)
    assert waiting > 0, "the stopped worker had nothing to do"
    assert all((server.source / path.name).read_bytes() == b"x" * LARGE for path in files)


@pytest.mark.root
@pytest.mark.own_loop
def test_full_source_and_dying_processes(resending: Callable[..., Server], tmp_path: Path) -> None:
    """Data without space is refused, whichever process dies; later data with space is accepted."""
    server = resending("--workers", "1", "--cache", "never")
    server.expect_log(DEATH_OF_THE_FRONT)
    server.expect_log(DEATH_OF_A_WORKER)
    (server.source / "small").mkdir()
    with tmpfs(server.source / "small", "size=4m"):
        path = server.mountpoint / "small" / "file"
        with opened(path, os.O_RDWR | os.O_CREAT) as fd:
            for _ in range(3):
                written = 0
                with pytest.raises(OSError) as caught:
                    while True:
                        written += os.pwrite(fd, b"f" * LARGE, written)
                assert caught.value.errno == errno.ENOSPC
                replace_front(server)
                (worker,) = process_ids(server, "worker")
                kill(worker)
                assert is_replaced(server, "worker", worker)
                with fails(errno.ENOSPC):
                    os.pwrite(fd, b"f" * LARGE, written)
                os.ftruncate(fd, 0)
                assert os.pwrite(fd, b"again", 0) == 5
                os.ftruncate(fd, 0)
        os.unlink(path)
        # The kernel sends RELEASE a moment after close(2) has returned.
        assert wait_until(lambda: os.statvfs(server.source / "small").f_bavail * 4096 > 3_900_000)
        forget_unused(server.mountpoint)


@pytest.mark.root
def test_file_system_below_the_source_is_unmounted_and_mounted(serve: Serve, tmp_path: Path) -> None:
    """As if a disk below the source were removed and inserted again."""
    server = serve("--workers", "1", "--cache", "never")
    (server.source / "disk").mkdir()
    image = make_image(tmp_path / "image", 8 << 20)
    path = server.mountpoint / "disk" / "file"
    with mounted(image, server.source / "disk", "-o", "loop"):
        path.write_bytes(b"on the disk")
        fd = os.open(path, os.O_RDWR)
        subprocess.run(["umount", "-l", server.source / "disk"], check=True)
        try:
            assert os.pwrite(fd, b"ON", 0) == 2, "what is open stays open"
            assert not path.exists()
            with fails(errno.ENOENT):
                os.open(path, os.O_RDONLY)
            assert os.listdir(server.mountpoint / "disk") == []
        finally:
            os.close(fd)
            # The server closes the last descriptors on the disk after RELEASE and FORGET.
            forget_unused(server.mountpoint)
        subprocess.run(["mount", "-o", "loop", image, server.source / "disk"], check=True)
        assert path.read_bytes() == b"ON the disk"
        assert os.listdir(server.mountpoint / "disk") != []
        forget_unused(server.mountpoint)


def descriptor_counts(server: Server) -> dict[str, int]:
    return {title: len(descriptors_of(pid)) for title, pid in titles(server).items()}


@pytest.mark.own_loop
@pytest.mark.parametrize("times", [3_000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(240)])])
def test_opens_and_closes_leak_nothing(serve: Serve, times: int) -> None:
    server = serve("--workers", "2")
    files = [server.mountpoint / f"{number}" for number in range(50)]
    for path in files:
        path.write_bytes(b"content")

    def open_and_close(count: int) -> None:
        for number in range(count):
            with opened(files[number % len(files)], os.O_RDWR) as fd:
                if number % 10 == 0:
                    os.pread(fd, LARGE, 0)

    open_and_close(500)
    assert wait_until(lambda: requests_with_workers(server) == 0)
    before = descriptor_counts(server)
    pids = titles(server)
    memory = {title: private_memory(pid) for title, pid in pids.items()}
    open_and_close(times)
    assert wait_until(lambda: descriptor_counts(server) == before), (before, descriptor_counts(server))
    grown = {title: private_memory(pid) - memory[title] for title, pid in pids.items()}
    assert all(growth < 1 << 20 for growth in grown.values()), grown


def test_no_process_outlives_the_supervisor(serve: Serve) -> None:
    """When a process changes its file system ids, the kernel clears its parent-death signal."""
    server = serve("--workers", "2")
    server.expect_log("has lost its supervisor: it ends", required=False)
    server.source.chmod(0o777)

    def make_files(directory: Path) -> None:
        os.mkdir(directory / "directory")
        for number in range(8):
            (directory / f"{number}").write_bytes(b"small")
            (directory / f"{number}").write_bytes(bytes(LARGE))

    run_as(STRANGER if os.geteuid() == 0 else MYSELF, make_files, server.mountpoint)
    assert server.process
    try:
        kill(server.pid)
        server.process.wait(30)
        server.expect_log("the supervisor has died; the keeper has detached")
        assert wait_until(lambda: server.processes() == []), server.processes()
        assert wait_until(lambda: not server.mounted()), "the mount is left behind"
        assert os.listdir(server.mountpoint) == []
        assert all((server.source / f"{number}").read_bytes() == bytes(LARGE) for number in range(8))
    finally:
        server.clean_up()
    assert not server.mounted()


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
def test_killed_workers_lose_and_repeat_nothing(serve: Serve, tmp_path: Path, how: str) -> None:
    server = serve("--workers", "2", "--cache", "never")
    server.expect_log(DEATH_OF_A_WORKER)
    finish = tmp_path / "finish"
    children = [Child(write_and_verify, server.mountpoint, number, finish) for number in range(3)]
    killed: set[int] = set()
    try:
        choose = random.Random(how)
        for _ in range(5):
            fresh: list[int] = []

            def all_are_there() -> bool:
                fresh[:] = [pid for pid in process_ids(server, "worker") if pid not in killed]  # noqa: B023
                return len(fresh) == 2  # noqa: B023

            assert wait_until(all_are_there), server.all_output()
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
        # Do not compare in the assert statement, which would print megabytes.
        same = [
            (server.source / name).read_bytes() == content
            for name, content in zip((f"random{number}", f"appended{number}"), result, strict=True)
        ]
        assert same == [True, True], f"process {number}: {same}"


@pytest.mark.by_workers
def test_worker_killed_with_unanswered_requests(serve: Serve) -> None:
    """It has received requests and done none. The next worker must do them all, and append only once."""
    server = serve("--workers", "1", "--cache", "never")
    server.expect_log(DEATH_OF_A_WORKER)
    (worker,) = process_ids(server, "worker")
    content = random.Random(1).randbytes(LARGE)
    (server.source / "there").write_bytes(content)
    descriptors: list[int] = []

    def open_one(name: str, flags: int) -> int:
        descriptors.append(os.open(server.mountpoint / name, flags | os.O_CREAT))
        return descriptors[-1]

    # Each writes to its own file: the kernel would delay a second write to the same file.
    requests: list[tuple[Callable[..., Any], tuple[Any, ...], Any]] = [
        (os.pwrite, (open_one("written", os.O_WRONLY), content, 5_000), LARGE),
        (os.write, (open_one("appended", os.O_WRONLY | os.O_APPEND), content), LARGE),
        (os.write, (open_one("synchronous", os.O_WRONLY | os.O_SYNC), content), LARGE),
        (os.pread, (open_one("there", os.O_RDONLY), LARGE, 0), content),
        (os.fsync, (open_one("synced", os.O_WRONLY),), None),
    ]
    try:
        stop_process(worker)
        children = [Child(outcome, function, *arguments) for function, arguments, _ in requests]
        try:
            if server.via == "own":
                # If the pipes of a user are small (pipe(7)), the front keeps some requests.
                small = "pipes hold fewer" in server.log.read_text()
                assert wait_until(lambda: requests_with_workers(server) >= (1 if small else len(requests)))
            else:
                time.sleep(0.5)  # with --loop llfuse there is one request at a time
        finally:
            kill(worker)
        assert [child.result() for child in children] == [expected for _, _, expected in requests]
    finally:
        for fd in descriptors:
            os.close(fd)
    assert (server.source / "written").read_bytes() == bytes(5_000) + content
    assert (server.source / "appended").read_bytes() == content
    assert (server.source / "synchronous").read_bytes() == content


@pytest.mark.own_loop
@pytest.mark.by_workers
@pytest.mark.at_once("a collected write does not wait for its answer")
def test_open_files_are_reopened_by_name_without_a_keeper(serve: Serve) -> None:
    """On architectures without a known clone system call, and if front and keeper both die."""
    program = "import platform; platform.machine = lambda: 'vax'; from llloop.cli.main import main; main()"
    server = serve("--workers", "1", command=[sys.executable, "-c", program, "serve"])
    if "has_resend" not in server.output.read_text():
        pytest.skip("this kernel does not send a dead front's requests again (Linux 6.9)")
    server.expect_log(DEATH_OF_THE_FRONT)
    server.expect_log("a file that was open when the front died cannot be opened again")
    with opened(server.mountpoint / "file", os.O_RDWR | os.O_CREAT) as file:
        gone = os.open(server.mountpoint / "gone", os.O_RDWR | os.O_CREAT)
        os.pwrite(file, b"before", 0)
        os.pwrite(gone, b"before", 0)
        os.unlink(server.mountpoint / "gone")
        (front,) = process_ids(server, "front")
        kill(front)
        assert os.pwrite(file, LARGE * b"a", 6) == LARGE
        with fails(errno.EBADF):
            os.pwrite(gone, LARGE * b"a", 6)
        with fails(errno.EBADF):
            os.close(gone)  # data written through a mapping may be lost, too
    assert (server.source / "file").read_bytes() == b"before" + LARGE * b"a"
