"""Descriptors that a worker fetches from the front, keeps, drops and fetches again."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llloop.linux import syscalls
from llloop.shared.messages import HANDLES_PER_FRONT
from llloop.shared.slots import Slots
from llloop.workers import descriptors as descriptors_module
from llloop.workers.descriptors import Descriptors
from tests.as_user import Child
from tests.expect import fails
from tests.unit.support import open_descriptors

# Handle numbers begin here in the first and in the second front of a mount.
FIRST, SECOND = HANDLES_PER_FRONT, 2 * HANDLES_PER_FRONT


class Front:
    """A process that has files open, as a front does."""

    def __init__(self, paths: list[Path], flags: int = os.O_RDWR, numbers: list[int] | None = None) -> None:
        # Opened here, so that their numbers are known. The child keeps them; this process closes them.
        self.descriptors = [os.open(path, flags) for path in paths]
        ready, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            if numbers is not None:
                # Move all of them first, because the new number of one may be the old number of another.
                above = [fcntl.fcntl(fd, fcntl.F_DUPFD, max(numbers) + 50) for fd in (tell, *self.descriptors)]
                tell = above[0]
                for fd, number in zip(above[1:], numbers, strict=True):
                    os.dup2(fd, number)
            os.write(tell, b"!")
            while True:
                time.sleep(60)
        os.read(ready, 1)
        for fd in (ready, tell, *self.descriptors):
            os.close(fd)
        self.descriptors = numbers or self.descriptors

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"file-{number}" for number in range(6)]
    for path in made:
        path.write_text(path.name)
    return made


@pytest.fixture
def front(paths: list[Path]) -> Iterator[Front]:
    process = Front(paths)
    yield process
    process.end()


@pytest.fixture
def descriptors(slots: Slots, front: Front) -> Iterator[Descriptors]:
    slots.set_front(front.pid)
    held = Descriptors(slots)
    yield held
    for handle in range(1, 100):
        release(held, FIRST + handle)


def release(descriptors: Descriptors, handle: int) -> None:
    descriptors.release(handle)
    close_what_is_left(descriptors)


def close_what_is_left(descriptors: Descriptors) -> None:
    """What a worker does after each request."""
    while descriptors.closing:
        descriptors.close(descriptors.closing.pop())


def name_behind(fd: int) -> str:
    return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))


def test_descriptor_is_fetched_once(descriptors: Descriptors, front: Front) -> None:
    fd = descriptors.get(FIRST + 7, front.descriptors[2])
    assert name_behind(fd) == "file-2"
    assert descriptors.get(FIRST + 7, front.descriptors[2]) == fd
    assert len(descriptors) == 1


def test_descriptor_shares_flags_and_position(descriptors: Descriptors, front: Front) -> None:
    """It is a duplicate (pidfd_getfd(2)), not the result of another open(2)."""
    first, second = descriptors.get(FIRST + 1, front.descriptors[0]), descriptors.get(FIRST + 2, front.descriptors[0])
    os.lseek(first, 3, os.SEEK_SET)
    assert os.lseek(second, 0, os.SEEK_CUR) == 3


def test_descriptor_is_close_on_exec(descriptors: Descriptors, front: Front) -> None:
    assert not os.get_inheritable(descriptors.get(FIRST + 1, front.descriptors[0]))


def test_release_closes_the_descriptor(descriptors: Descriptors, front: Front) -> None:
    before = open_descriptors()
    fd = descriptors.get(FIRST + 1, front.descriptors[0])
    release(descriptors, FIRST + 1)
    with fails(errno.EBADF):
        os.fstat(fd)
    assert len(descriptors) == 0
    descriptors.release(FIRST + 1)  # it may have been dropped before
    descriptors.release(FIRST + 99)
    assert open_descriptors() <= before + 1, "only the front's pidfd stays"


def test_released_descriptor_is_fetched_again(descriptors: Descriptors, front: Front) -> None:
    descriptors.get(FIRST + 1, front.descriptors[0])
    descriptors.release(FIRST + 1)
    assert name_behind(descriptors.get(FIRST + 1, front.descriptors[0])) == "file-0"


def test_closed_descriptor_of_the_front_gives_ebadf(descriptors: Descriptors) -> None:
    with fails(errno.EBADF):
        descriptors.get(FIRST + 1, 9999)
    assert len(descriptors) == 0


@pytest.fixture
def short_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no next front, and it is not long until that is clear."""
    monkeypatch.setattr(descriptors_module, "FRONT_TIMEOUT", 0.05)


def test_dead_front_without_successor_gives_eio(
    descriptors: Descriptors, front: Front, slots: Slots, short_absence: None
) -> None:
    ended = Child(os.getpid)
    slots.set_front(ended.pid)
    ended.result()
    with fails(errno.EIO):
        descriptors.get(SECOND + 2, front.descriptors[1])
    assert len(descriptors) == 0


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("noticed", [False, True])
def test_worker_waits_for_the_next_front(slots: Slots, paths: list[Path], asked_before: bool, noticed: bool) -> None:
    """The next front has the same descriptors. A worker may need one while there is no front."""
    first = Front(paths)
    slots.set_front(first.pid)
    descriptors = Descriptors(slots)
    if asked_before:
        descriptors.get(FIRST + 1, first.descriptors[0])
    first.end()
    if noticed:  # by the supervisor
        slots.clear_front()
    second = Front(paths, numbers=first.descriptors)
    timer = threading.Timer(0.1, slots.set_front, [second.pid])
    timer.start()
    try:
        assert name_behind(descriptors.get(FIRST + 2, first.descriptors[3])) == "file-3"
        assert slots.generation == 2, "it was not waited for"
        assert len(descriptors) == 1, "what the first one had open is still held"
        assert name_behind(descriptors.get(FIRST + 1, first.descriptors[0])) == "file-0"
    finally:
        timer.join()
        second.end()
        for handle in (1, 2):
            release(descriptors, FIRST + handle)


def test_worker_waits_for_next_front_when_pid_is_reused(descriptors: Descriptors, front: Front, slots: Slots) -> None:
    """Between death and wait(2) of a front, `front_pid` names a process that has ended."""
    ended = os.fork()
    if ended == 0:
        os._exit(0)
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
    slots.set_front(ended)
    timer = threading.Timer(0.1, slots.set_front, [front.pid])
    timer.start()
    try:
        assert name_behind(descriptors.get(FIRST + 1, front.descriptors[4])) == "file-4"
    finally:
        timer.join()
        os.waitpid(ended, 0)


def test_descriptors_of_a_previous_front_are_dropped(
    descriptors: Descriptors, front: Front, slots: Slots, paths: list[Path]
) -> None:
    """Handles of a previous front are invalid: the new front may assign the same number to another file."""
    descriptors.get(FIRST + 1, front.descriptors[0])
    before = open_descriptors()
    successor = Front(list(reversed(paths)))
    try:
        slots.set_front(successor.pid)
        assert name_behind(descriptors.get(SECOND + 1, successor.descriptors[0])) == "file-5"
        assert len(descriptors) == 1
        close_what_is_left(descriptors)
        assert open_descriptors() == before, "something of the old front was left open"
        release(descriptors, SECOND + 1)
    finally:
        successor.end()


def test_request_of_a_previous_front_gets_its_file_from_the_next(
    descriptors: Descriptors, front: Front, slots: Slots, paths: list[Path]
) -> None:
    """The request may still be in the pipe. The next front has the same descriptors."""
    successor = Front(paths, numbers=front.descriptors)
    try:
        descriptors.get(FIRST + 1, front.descriptors[0])
        slots.set_front(successor.pid)
        found = [name_behind(descriptors.get(FIRST + 1 + i, front.descriptors[i])) for i in range(6)]
        assert found == [path.name for path in paths]
        # A descriptor that the next front lacks is not fetched from any other process.
        with fails(errno.EBADF):
            descriptors.get(FIRST + 50, max(front.descriptors) + 1000)
    finally:
        successor.end()


def test_process_with_reused_pid_is_not_the_front(
    descriptors: Descriptors,
    front: Front,
    slots: Slots,
    paths: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    short_absence: None,
) -> None:
    """The supervisor notes a front's end only after the kernel may have given its id to another process."""
    # The start time counts in clock ticks. Both processes may start in the same tick.
    started = slots.front_started - 1
    front.end()
    stranger = Front(paths[3:], numbers=front.descriptors[:3])
    try:
        monkeypatch.setattr("llloop.shared.slots.start_time", lambda pid: started)
        slots.set_front(stranger.pid)
        with fails(errno.EIO):
            descriptors.get(FIRST + 1, front.descriptors[0])
        assert len(descriptors) == 0
    finally:
        os.kill(stranger.pid, signal.SIGKILL)
        os.waitpid(stranger.pid, 0)
        front.pid = os.fork()  # for the fixture to end
        if front.pid == 0:
            signal.pause()


def test_process_with_reused_pid_is_not_reopened_from(
    descriptors: Descriptors, front: Front, slots: Slots, monkeypatch: pytest.MonkeyPatch, short_absence: None
) -> None:
    """The process got the id after the worker had checked that it was the front's."""

    def refused(pidfd: int, fd: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(descriptors_module, "pidfd_getfd", refused)
    descriptors.get(FIRST + 1, front.descriptors[0])
    # As if the front had ended, although /proc shows a process with its id.
    monkeypatch.setattr(descriptors_module, "is_readable", lambda fd, seconds=0.0: True)
    slots.clear_front()
    with fails(errno.EIO):
        descriptors.get(FIRST + 2, front.descriptors[1])


def test_fetching_without_a_front_gives_eio(
    descriptors: Descriptors, front: Front, slots: Slots, short_absence: None
) -> None:
    slots.clear_front()
    with fails(errno.EIO):
        descriptors.get(FIRST + 1, front.descriptors[0])


def test_fetching_is_retried_while_refused(
    descriptors: Descriptors, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the front acts with a caller's credentials, the kernel refuses pidfd_getfd(2)."""
    pull = syscalls.pidfd_getfd
    refusals = [1, 1, 1]

    def refused_at_first(pidfd: int, fd: int) -> int:
        if refusals:
            refusals.pop()
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return pull(pidfd, fd)

    def refused(descriptors: Descriptors, descriptor: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(descriptors_module, "pidfd_getfd", refused_at_first)
    monkeypatch.setattr(Descriptors, "_reopen", refused)
    first, second = (descriptors.get(FIRST + number, front.descriptors[0]) for number in (1, 2))
    os.lseek(first, 3, os.SEEK_SET)
    assert os.lseek(second, 0, os.SEEK_CUR) == 3, "the file was opened again"


def test_files_are_reopened_without_pidfd_getfd(
    descriptors: Descriptors, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """seccomp forbids pidfd_getfd(2) in some containers."""

    def refused(pidfd: int, fd: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(descriptors_module, "pidfd_getfd", refused)
    fd = descriptors.get(FIRST + 1, front.descriptors[3])
    assert name_behind(fd) == "file-3"
    assert not os.get_inheritable(fd)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_DSYNC, os.O_RDONLY | os.O_TRUNC])
def test_reopened_file_has_same_flags_and_content(
    slots: Slots, paths: list[Path], monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    front = Front(paths[:1], flags & ~os.O_TRUNC)
    try:
        slots.set_front(front.pid)
        monkeypatch.setattr(
            descriptors_module, "pidfd_getfd", lambda pidfd, fd: (_ for _ in ()).throw(OSError(errno.ENOSYS, ""))
        )
        descriptors = Descriptors(slots)
        fd = descriptors.get(FIRST + 1, front.descriptors[0])
        info = Path(f"/proc/self/fdinfo/{fd}").read_text().split()
        reopened = int(info[info.index("flags:") + 1], 8)
        kept = os.O_ACCMODE | os.O_DSYNC
        assert reopened & kept == flags & kept
        assert paths[0].read_text() == "file-0"
        release(descriptors, FIRST + 1)
    finally:
        front.end()


def test_worker_without_free_descriptors_drops_some(slots: Slots, front: Front) -> None:
    slots.set_front(front.pid)

    def pull_many() -> list[str]:
        descriptors = Descriptors(slots)
        descriptors.get(FIRST + 1, front.descriptors[0])
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 4, highest + 4))
        names = []
        for number in range(60):
            names.append(name_behind(descriptors.get(FIRST + 100 + number, front.descriptors[number % 6])))
        return names

    assert Child(pull_many).result() == [f"file-{number % 6}" for number in range(60)]
