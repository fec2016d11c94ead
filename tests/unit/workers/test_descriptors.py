"""Descriptors that a worker pulls from another process, keeps, drops and pulls again."""

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
    """A process that has files open, as a front has, and does nothing."""

    def __init__(self, paths: list[Path], flags: int = os.O_RDWR, numbers: list[int] | None = None) -> None:
        # Opened here, so that their numbers are known; the child keeps them, this process does not.
        self.descriptors = [os.open(path, flags) for path in paths]
        ready, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            if numbers is not None:
                # All out of the way first, since one's new number may be another's old one.
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
    slots.new_front(front.pid)
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


def test_a_descriptor_is_pulled_once_and_kept(descriptors: Descriptors, front: Front) -> None:
    fd = descriptors.get(FIRST + 7, front.descriptors[2])
    assert name_behind(fd) == "file-2"
    assert descriptors.get(FIRST + 7, front.descriptors[2]) == fd
    assert len(descriptors) == 1


def test_it_is_the_same_open_file(descriptors: Descriptors, front: Front) -> None:
    """A duplicate, not another open: flags and position are shared."""
    first, second = descriptors.get(FIRST + 1, front.descriptors[0]), descriptors.get(FIRST + 2, front.descriptors[0])
    os.lseek(first, 3, os.SEEK_SET)
    assert os.lseek(second, 0, os.SEEK_CUR) == 3


def test_programs_started_do_not_inherit_it(descriptors: Descriptors, front: Front) -> None:
    assert not os.get_inheritable(descriptors.get(FIRST + 1, front.descriptors[0]))


def test_a_release_closes_it(descriptors: Descriptors, front: Front) -> None:
    before = open_descriptors()
    fd = descriptors.get(FIRST + 1, front.descriptors[0])
    release(descriptors, FIRST + 1)
    with fails(errno.EBADF):
        os.fstat(fd)
    assert len(descriptors) == 0
    descriptors.release(FIRST + 1)  # it may have been dropped before
    descriptors.release(FIRST + 99)
    assert open_descriptors() <= before + 1, "only the front's pidfd stays"


def test_what_was_released_is_pulled_again(descriptors: Descriptors, front: Front) -> None:
    descriptors.get(FIRST + 1, front.descriptors[0])
    descriptors.release(FIRST + 1)
    assert name_behind(descriptors.get(FIRST + 1, front.descriptors[0])) == "file-0"


def test_a_descriptor_the_front_has_closed(descriptors: Descriptors) -> None:
    with fails(errno.EBADF):
        descriptors.get(FIRST + 1, 9999)
    assert len(descriptors) == 0


@pytest.fixture
def short_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no next front, and it is not long until that is clear."""
    monkeypatch.setattr(descriptors_module, "_LONGEST_ABSENCE", 0.05)


def test_a_front_that_is_gone_and_has_no_successor(
    descriptors: Descriptors, front: Front, slots: Slots, short_absence: None
) -> None:
    ended = Child(os.getpid)
    slots.new_front(ended.pid)
    ended.result()
    with fails(errno.EIO):
        descriptors.get(SECOND + 2, front.descriptors[1])
    assert len(descriptors) == 0


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("noticed", [False, True])
def test_the_next_front_is_waited_for(slots: Slots, paths: list[Path], asked_before: bool, noticed: bool) -> None:
    """It has the descriptors of the one before; a worker may need one in the moments in which there is no front."""
    first = Front(paths)
    slots.new_front(first.pid)
    descriptors = Descriptors(slots)
    if asked_before:
        descriptors.get(FIRST + 1, first.descriptors[0])
    first.end()
    if noticed:  # by the supervisor
        slots.no_front()
    second = Front(paths, numbers=first.descriptors)
    timer = threading.Timer(0.1, slots.new_front, [second.pid])
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


def test_a_front_that_a_worker_sees_die_is_waited_for_though_others_took_its_number(
    descriptors: Descriptors, front: Front, slots: Slots
) -> None:
    """Whoever asks `front_pid` in between sees a process that has ended and not been waited for."""
    ended = os.fork()
    if ended == 0:
        os._exit(0)
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
    slots.new_front(ended)
    timer = threading.Timer(0.1, slots.new_front, [front.pid])
    timer.start()
    try:
        assert name_behind(descriptors.get(FIRST + 1, front.descriptors[4])) == "file-4"
    finally:
        timer.join()
        os.waitpid(ended, 0)


def test_what_a_front_before_had_open_is_void(
    descriptors: Descriptors, front: Front, slots: Slots, paths: list[Path]
) -> None:
    """Its handles mean nothing to the new one, which might give the same number to another file."""
    descriptors.get(FIRST + 1, front.descriptors[0])
    before = open_descriptors()
    successor = Front(list(reversed(paths)))
    try:
        slots.new_front(successor.pid)
        assert name_behind(descriptors.get(SECOND + 1, successor.descriptors[0])) == "file-5"
        assert len(descriptors) == 1
        close_what_is_left(descriptors)
        assert open_descriptors() == before, "something of the old front was left open"
        release(descriptors, SECOND + 1)
    finally:
        successor.end()


def test_a_request_of_a_front_before_gets_its_file_from_the_next(
    descriptors: Descriptors, front: Front, slots: Slots, paths: list[Path]
) -> None:
    """It may lie in the pipe still. A front has the descriptors of the one before under the same numbers."""
    successor = Front(paths, numbers=front.descriptors)
    try:
        descriptors.get(FIRST + 1, front.descriptors[0])
        slots.new_front(successor.pid)
        found = [name_behind(descriptors.get(FIRST + 1 + i, front.descriptors[i])) for i in range(6)]
        assert found == [path.name for path in paths]
        # What the next one has not is nobody else's either.
        with fails(errno.EBADF):
            descriptors.get(FIRST + 50, max(front.descriptors) + 1000)
    finally:
        successor.end()


def test_a_process_that_got_the_number_of_a_front_is_not_the_front(
    descriptors: Descriptors, front: Front, slots: Slots, paths: list[Path], short_absence: None
) -> None:
    """The supervisor notes a front's end a moment after the number was free for others."""
    # In clock ticks: the stranger may start in the same one as the front of this test.
    started = slots.front_started - 1
    front.end()
    stranger = Front(paths[3:], numbers=front.descriptors[:3])
    try:
        slots._front[0], slots._front[2] = stranger.pid, started
        with fails(errno.EIO):
            descriptors.get(FIRST + 1, front.descriptors[0])
        assert len(descriptors) == 0
    finally:
        os.kill(stranger.pid, signal.SIGKILL)
        os.waitpid(stranger.pid, 0)
        front.pid = os.fork()  # for the fixture to end
        if front.pid == 0:
            signal.pause()


def test_where_files_are_opened_again_a_stranger_is_not_taken_for_the_front_either(
    descriptors: Descriptors, front: Front, slots: Slots, monkeypatch: pytest.MonkeyPatch, short_absence: None
) -> None:
    """It got the number after the worker had made sure that it was the front's."""

    def refused(pidfd: int, fd: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(descriptors_module, "pidfd_getfd", refused)
    descriptors.get(FIRST + 1, front.descriptors[0])
    ended = Child(os.getpid)
    pidfd = os.pidfd_open(ended.pid)
    ended.result()
    os.dup2(pidfd, descriptors._pidfd)  # as if the front had ended; /proc shows a process of its number all the same
    os.close(pidfd)
    slots.no_front()
    with fails(errno.EIO):
        descriptors.get(FIRST + 2, front.descriptors[1])


def test_without_a_front_there_is_nothing_to_pull(
    descriptors: Descriptors, front: Front, slots: Slots, short_absence: None
) -> None:
    slots.no_front()
    with fails(errno.EIO):
        descriptors.get(FIRST + 1, front.descriptors[0])


def test_a_refusal_that_passes_is_waited_for(
    descriptors: Descriptors, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the front acts as somebody else it may not be looked into."""
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
    monkeypatch.setattr(Descriptors, "_open_again", refused)
    first, second = (descriptors.get(FIRST + number, front.descriptors[0]) for number in (1, 2))
    os.lseek(first, 3, os.SEEK_SET)
    assert os.lseek(second, 0, os.SEEK_CUR) == 3, "the file was opened again"


def test_without_the_right_to_pull_files_are_opened_again(
    descriptors: Descriptors, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tracing is forbidden, as seccomp does in containers."""

    def refused(pidfd: int, fd: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(descriptors_module, "pidfd_getfd", refused)
    fd = descriptors.get(FIRST + 1, front.descriptors[3])
    assert name_behind(fd) == "file-3"
    assert not os.get_inheritable(fd)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_DSYNC, os.O_RDONLY | os.O_TRUNC])
def test_opened_again_it_has_the_same_flags_and_keeps_its_content(
    slots: Slots, paths: list[Path], monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    front = Front(paths[:1], flags & ~os.O_TRUNC)
    try:
        slots.new_front(front.pid)
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


def test_out_of_descriptors_it_drops_some_and_goes_on(slots: Slots, front: Front) -> None:
    slots.new_front(front.pid)

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
