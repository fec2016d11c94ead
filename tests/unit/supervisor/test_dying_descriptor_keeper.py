"""What becomes of orders to a keeper that dies, with processes that do nothing in the front's place."""

from __future__ import annotations

import errno
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from llloop.linux.pidfds import start_time
from llloop.supervisor import descriptor_keeper as keeper_module
from llloop.supervisor.child import Cloned
from llloop.supervisor.descriptor_keeper import _ANSWER, _COMMAND, _START, DescriptorKeeper
from tests.expect import fails


class Processes:
    """A keeper, the fronts that it starts, and a pipe through which each of these says that it serves."""

    def __init__(self) -> None:
        self.reports, self.report = os.pipe()
        self.sentinel = -1
        self.keeper = DescriptorKeeper(self._front, lambda: None)
        self.keeper.sentinel = lambda: self.sentinel
        self._pids: list[int] = []

    def _front(self, own: Collection[int]) -> None:
        os.write(self.report, b"!")
        signal.pause()

    def start_keeper(self, run: Callable[[], None] | None = None) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                (run or self.keeper.run)()
            finally:
                os._exit(0)
        self._pids.append(pid)
        self.sentinel = os.pidfd_open(pid)
        return pid

    def start_front(self) -> Cloned:
        front = self.keeper.start_front()
        self._pids.append(front.pid)
        return front

    def serving(self, seconds: float) -> int:
        """How many fronts have come to serve within that time."""
        count = 0
        while select.select([self.reports], [], [], seconds)[0]:
            os.read(self.reports, 1)
            count += 1
        return count

    def close(self) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self._pids:
            os.waitpid(pid, 0)
        for fd in (*self.keeper.descriptors, self.reports, self.report):
            os.close(fd)


@pytest.fixture
def processes() -> Iterator[Processes]:
    own = Processes()
    yield own
    own.close()


def test_it_starts_fronts_that_share_its_descriptors(processes: Processes) -> None:
    keeper = processes.start_keeper()
    front = processes.start_front()
    assert processes.serving(0.5) == 1
    assert os.listdir(f"/proc/{front.pid}/fd") == os.listdir(f"/proc/{keeper}/fd")


def test_one_that_dies_is_noticed_and_what_it_was_told_is_not_done_by_the_next(processes: Processes) -> None:
    deaf = processes.start_keeper(signal.pause)
    threading.Timer(0.2, os.kill, (deaf, signal.SIGKILL)).start()
    began = time.monotonic()
    with fails(errno.ESRCH):
        processes.start_front()
    assert time.monotonic() - began < 5
    processes.start_keeper()
    processes.start_front()
    assert processes.serving(0.5) == 1


def test_what_a_front_that_has_ended_had_open_is_lost_and_no_more(processes: Processes) -> None:
    processes.start_keeper()
    ended = os.fork()
    if ended == 0:
        os._exit(0)
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
    with fails(errno.ESRCH):
        processes.keeper.fetch(ended)
    os.waitpid(ended, 0)
    processes.start_front()
    assert processes.serving(0.3) == 1


def test_without_one_nothing_is_told(processes: Processes) -> None:
    with fails(errno.ESRCH):
        processes.start_front()
    processes.start_keeper()
    assert processes.serving(0.3) == 0


def test_a_front_of_which_nobody_was_told_does_not_serve(processes: Processes) -> None:
    """Its keeper died between starting it and saying so; the supervisor then has another one started."""
    keeper = processes.keeper
    processes.start_keeper()
    _, command, answer, _ = keeper.descriptors
    os.write(command, _COMMAND.pack(_START, 1000, 0, 0))
    processes._pids.append(_ANSWER.unpack(os.read(answer, _ANSWER.size))[1])
    assert processes.serving(0.5) == 0
    processes.start_front()
    assert processes.serving(0.5) == 1


def test_an_answer_that_came_too_late_is_not_taken_for_the_next(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper was held up while the supervisor waited; the process id in its late answer is of no use any more."""
    keeper = processes.start_keeper()
    os.kill(keeper, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(keeper_module, "_PATIENCE", 0.05)
        with fails(errno.ETIMEDOUT):
            processes.start_front()
    os.kill(keeper, signal.SIGCONT)
    _, _, late, _ = processes.keeper.descriptors
    assert select.select([late], [], [], 10)[0]
    front = processes.start_front()
    assert processes.serving(0.5) == 1
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    processes._pids += set(map(int, children)) - {keeper, front.pid}
    assert Path(f"/proc/{front.pid}/stat").exists()


def test_the_descriptors_of_a_process_that_has_the_fronts_number_are_not_fetched(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The front has ended; who has its process id now was started at another time."""
    processes.start_keeper()
    stranger = os.fork()
    if stranger == 0:
        signal.pause()
    processes._pids.append(stranger)
    monkeypatch.setattr(keeper_module, "start_time", lambda pid: start_time(pid) - 1)
    with fails(errno.ESRCH):
        processes.keeper.fetch(stranger)
