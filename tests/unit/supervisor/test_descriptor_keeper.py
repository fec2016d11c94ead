"""The descriptor keeper with real processes: files of a killed front are open in the next one."""

from __future__ import annotations

import mmap
import os
import select
import signal
import stat
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from llloop.linux.process import Process
from llloop.linux.syscalls import is_readable, open_descriptors
from llloop.logging.stacks import Stacks
from llloop.supervisor import descriptor_keeper as keeper_module
from llloop.supervisor.child import Child, start_child
from llloop.supervisor.descriptor_keeper import DescriptorKeeper
from tests.as_user import MYSELF, run_as

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

TIMEOUT = 10.0  # seconds


class Pipe:
    """Receives lines from other processes."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC)

    def tell(self, *words: object) -> None:
        os.write(self.writer, (" ".join(map(str, words)) + "\n").encode())

    def hear(self) -> list[str]:
        """Wait for one line."""
        poll = select.poll()
        poll.register(self.reader, select.POLLIN)
        assert poll.poll(TIMEOUT * 1000), "nothing came"
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(self.reader, 1)
        return line.decode().split()

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    own = Pipe()
    yield own
    own.close()


class Processes:
    """A descriptor keeper and fronts, which end with the test."""

    def __init__(self, front: Callable[[Collection[int]], None], on_supervisor_death: Callable[[], None]) -> None:
        self.keeper = DescriptorKeeper(front, on_supervisor_death)
        self.processes: list[Process] = []

    def start_keeper(self) -> Process:
        process = start_child("llloop-keeper", self.keeper.run, Stacks("llloop-keeper"), detached=False, outlives=True)
        self.processes.append(process)
        return process

    def start_front(self) -> Process:
        front = self.keeper.start_front()
        self.processes.append(front)
        return front

    def end(self, process: Process) -> None:
        assert process.end(TIMEOUT)
        assert process.exit_code == -signal.SIGKILL

    def close(self) -> None:
        for process in self.processes:
            if process.exit_code is None:
                self.end(process)
        self.keeper.close()


@contextmanager
def household(front: Callable[[Collection[int]], None]) -> Iterator[Processes]:
    own = Processes(front, lambda: None)
    try:
        yield own
    finally:
        own.close()


def rest() -> None:
    while True:
        time.sleep(60)


def files_of_others(own: Collection[int]) -> list[int]:
    """The files that a front finds open; `multiprocessing` has opened /dev/null besides."""
    return sorted(fd for fd in open_descriptors() - set(own) if stat.S_ISREG(os.fstat(fd).st_mode))


def opener(path: Path, pipe: Pipe) -> Callable[[Collection[int]], None]:
    """A front that says which files it finds open, by their content, then opens one more and removes its name."""

    def front(own: Collection[int]) -> None:
        links = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in open_descriptors()}
        found = sorted(fd for fd, link in links.items() if link.startswith(str(path)))
        contents = [os.pread(fd, 100, 0).decode() for fd in found]
        name = path / f"file-{len(found)}"
        name.write_text(f"content-{len(found)}")
        fd = os.open(name, os.O_RDWR)
        name.unlink()
        pipe.tell(os.getpid(), os.getppid(), fd, *contents)
        rest()

    return front


def test_next_front_inherits_descriptors_of_a_killed_one(tmp_path: Path, pipe: Pipe) -> None:
    with household(opener(tmp_path, pipe)) as own:
        own.start_keeper()
        had: list[str] = []
        numbers = []
        for _ in range(4):
            front = own.start_front()
            pid, parent, fd, *contents = pipe.hear()
            assert int(pid) == front.pid
            assert int(parent) == os.getpid(), "the supervisor must be the one that sees it end"
            assert contents == had
            own.end(front)
            had.append(f"content-{len(had)}")
            numbers.append(int(fd))
        assert len(set(numbers)) == 4


def test_descriptor_closed_by_the_front_is_closed(tmp_path: Path, pipe: Pipe) -> None:
    """Neither the next front nor the keeper has it open."""

    def front(own: Collection[int]) -> None:
        found = files_of_others(own)
        for fd in found:
            os.close(fd)
        if not found:
            os.open(tmp_path / "file", os.O_RDONLY | os.O_CREAT)
        pipe.tell(len(found))
        rest()

    with household(front) as own:
        own.start_keeper()
        for expected in (0, 1, 0):
            process = own.start_front()
            assert pipe.hear() == [str(expected)]
            own.end(process)


def test_supervisor_has_no_descriptors_of_the_front(tmp_path: Path, pipe: Pipe) -> None:
    with household(opener(tmp_path, pipe)) as own:
        own.start_keeper()
        before = open_descriptors()
        front = own.start_front()
        pipe.hear()
        assert open_descriptors() == before | {front.pidfd}


def test_exit_code_of_a_front_is_reported(pipe: Pipe) -> None:
    def front(own: Collection[int]) -> None:
        pipe.tell("here")
        raise SystemExit(3)

    with household(front) as own:
        own.start_keeper()
        process = own.start_front()
        pipe.hear()
        assert process.wait(TIMEOUT) == 3


def test_only_shared_mappings_are_shared(pipe: Pipe) -> None:
    """Fronts share only descriptors and shared mappings: each front starts with fresh memory."""
    private = [0]
    shared = mmap.mmap(-1, 4096)

    def front(own: Collection[int]) -> None:
        private[0] += 1
        shared[0] += 1
        pipe.tell(private[0], shared[0])
        rest()

    with household(front) as own:
        own.start_keeper()
        for number in (1, 2, 3):
            process = own.start_front()
            assert pipe.hear() == ["1", str(number)]
            own.end(process)
    shared.close()


def test_new_keeper_fetches_descriptors_of_the_front(tmp_path: Path, pipe: Pipe) -> None:
    with household(opener(tmp_path, pipe)) as own:
        first = own.start_keeper()
        for expected in ([], ["content-0"]):
            front = own.start_front()
            assert pipe.hear()[3:] == expected
            if not expected:
                own.end(front)
        assert front.pid is not None
        own.end(first)
        own.start_keeper()
        os.kill(front.pid, signal.SIGSTOP)
        own.keeper.fetch(front.pid)
        own.end(front)
        own.start_front()
        assert pipe.hear()[3:] == ["content-0", "content-1"]


def test_fetched_descriptor_has_same_number_and_open_file(tmp_path: Path, pipe: Pipe) -> None:
    (tmp_path / "file").write_text("0123456789")
    times = mmap.mmap(-1, 4096)

    def front(own: Collection[int]) -> None:
        times[0] += 1
        if times[0] == 1:
            fd = os.open(tmp_path / "file", os.O_RDONLY)
            os.dup2(fd, 200)
            os.close(fd)
            os.read(200, 4)
        pipe.tell(os.lseek(200, 0, os.SEEK_CUR), os.get_inheritable(200))
        rest()

    with household(front) as own:
        keeper = own.start_keeper()
        process = own.start_front()
        pipe.hear()
        assert process.pid is not None
        own.end(keeper)
        own.start_keeper()
        own.keeper.fetch(process.pid)
        own.end(process)
        own.start_front()
        assert pipe.hear() == ["4", "False"]
    times.close()


def test_failed_fetch_is_reported(tmp_path: Path, pipe: Pipe) -> None:
    ended = run_as(MYSELF, os.getpid)
    with household(opener(tmp_path, pipe)) as own:
        own.start_keeper()
        with pytest.raises(OSError):
            own.keeper.fetch(ended)
        own.start_front()
        assert pipe.hear()[3:] == []


def test_stopped_keeper_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "TIMEOUT", 0.05)
    with household(lambda own: None) as own, pytest.raises(TimeoutError):
        own.keeper.start_front()


def test_missing_clone_system_call_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "SYS_CLONE", None)
    with household(lambda own: None) as own:
        own.start_keeper()
        with pytest.raises(OSError):
            own.keeper.start_front()


def test_front_can_be_watched_by_pidfd(tmp_path: Path, pipe: Pipe) -> None:
    """The keeper holds the ends of pipes open, so their end does not show that the front has died."""
    with household(opener(tmp_path, pipe)) as own:
        own.start_keeper()
        front = Child("llloop-front", lambda stacks: own.start_front())
        process = front.start()
        pipe.hear()
        front.signal(signal.SIGKILL)
        assert is_readable(process.pidfd, TIMEOUT)
        assert front.pid is None
        assert process.wait() == -signal.SIGKILL
        front.start()
        assert pipe.hear()[3:] == ["content-0"]
        front.end()
        assert front.process is None


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_keeper_runs_its_callback_after_death_of_supervisor(pipe: Pipe, how: str) -> None:
    def supervisor() -> None:
        keeper = DescriptorKeeper(lambda own: rest(), lambda: pipe.tell("on_supervisor_death", os.getpid()))
        process = start_child("llloop-keeper", keeper.run, Stacks("llloop-keeper"), detached=False, outlives=True)
        front = keeper.start_front()
        pipe.tell("started", process.pid, front.pid)
        if how == "killed":
            rest()
        os._exit(0)

    pid = os.fork()
    if pid == 0:
        try:
            supervisor()
        finally:
            os._exit(1)
    _, keeper, front = pipe.hear()
    with ExitStack() as stack:
        front_fd = os.pidfd_open(int(front))
        stack.callback(os.close, front_fd)
        keeper_fd = os.pidfd_open(int(keeper))
        stack.callback(os.close, keeper_fd)
        if how == "killed":
            time.sleep(0.05)
            poll = select.poll()
            poll.register(pipe.reader, select.POLLIN)
            assert not poll.poll(0), "said while the supervisor lives"
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        try:
            assert pipe.hear() == ["on_supervisor_death", keeper]
        finally:
            for fd in (front_fd, keeper_fd):
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
        for fd in (front_fd, keeper_fd):
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            assert poll.poll(TIMEOUT * 1000)


def test_keeper_does_not_run_its_callback_while_supervisor_lives(pipe: Pipe) -> None:
    own = Processes(lambda descriptors: None, lambda: pipe.tell("on_supervisor_death"))
    keeper = own.start_keeper()
    own.end(keeper)
    own.close()
    poll = select.poll()
    poll.register(pipe.reader, select.POLLIN)
    assert not poll.poll(50)
