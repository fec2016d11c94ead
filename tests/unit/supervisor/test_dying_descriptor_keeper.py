"""Orders to a descriptor keeper that dies, with fronts that do nothing."""

from __future__ import annotations

import errno
import os
import select
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from llloop.linux.pidfds import start_time
from llloop.linux.process import Process
from llloop.supervisor import descriptor_keeper as keeper_module
from llloop.supervisor.descriptor_keeper import _ANSWER, _COMMAND, _START, DescriptorKeeper
from tests.expect import fails


class Processes:
    """A keeper, the fronts that it starts, and a pipe to which each front writes when it serves."""

    def __init__(self) -> None:
        self.reports, self.report = os.pipe()
        self._keeper_process: Process | None = None
        self.keeper = DescriptorKeeper(self._front, lambda: None, lambda: self._keeper_process)
        self.pids: list[int] = []

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
        self.pids.append(pid)
        self._keeper_process = Process(pid)
        return pid

    def start_front(self) -> Process:
        front = self.keeper.start_front()
        self.pids.append(front.pid)
        return front

    def serving(self, seconds: float) -> int:
        """How many fronts have come to serve within that time."""
        count = 0
        while select.select([self.reports], [], [], seconds)[0]:
            os.read(self.reports, 1)
            count += 1
        return count

    def close(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            os.waitpid(pid, 0)
        for fd in (*self.keeper.descriptors, self.reports, self.report):
            os.close(fd)


@pytest.fixture
def processes() -> Iterator[Processes]:
    own = Processes()
    yield own
    own.close()


def test_keeper_starts_fronts_that_share_its_descriptors(processes: Processes) -> None:
    keeper = processes.start_keeper()
    front = processes.start_front()
    assert processes.serving(0.5) == 1
    assert os.listdir(f"/proc/{front.pid}/fd") == os.listdir(f"/proc/{keeper}/fd")


def test_next_keeper_ignores_orders_to_the_dead_one(processes: Processes) -> None:
    deaf = processes.start_keeper(signal.pause)
    threading.Timer(0.2, os.kill, (deaf, signal.SIGKILL)).start()
    with fails(errno.ESRCH):  # not ETIMEDOUT: it does not wait until the timeout
        processes.start_front()
    processes.start_keeper()
    processes.start_front()
    assert processes.serving(0.5) == 1


def test_only_descriptors_of_the_dead_front_are_lost(processes: Processes) -> None:
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


def test_order_without_a_keeper_fails(processes: Processes) -> None:
    with fails(errno.ESRCH):
        processes.start_front()
    processes.start_keeper()
    assert processes.serving(0.3) == 0


def test_unreported_front_does_not_serve(processes: Processes) -> None:
    """Its keeper died between starting and reporting it. The supervisor then has another front started."""
    keeper = processes.keeper
    processes.start_keeper()
    _, command, answer, _ = keeper.descriptors
    os.write(command, _COMMAND.pack(_START, 1000, 0, 0))
    processes.pids.append(_ANSWER.unpack(os.read(answer, _ANSWER.size))[1])
    assert processes.serving(0.5) == 0
    processes.start_front()
    assert processes.serving(0.5) == 1


def test_late_answer_is_ignored(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper stalled while the supervisor waited. The process id in its late answer is invalid by now."""
    keeper = processes.start_keeper()
    os.kill(keeper, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(keeper_module, "TIMEOUT", 0.05)
        with fails(errno.ETIMEDOUT):
            processes.start_front()
    os.kill(keeper, signal.SIGCONT)
    _, _, late, _ = processes.keeper.descriptors
    assert select.select([late], [], [], 10)[0]
    front = processes.start_front()
    assert processes.serving(0.5) == 1
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    processes.pids += set(map(int, children)) - {keeper, front.pid}
    assert Path(f"/proc/{front.pid}/stat").exists()


def test_descriptors_of_a_reused_pid_are_not_fetched(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The front has ended. The process that has its id now has another start time."""
    processes.start_keeper()
    stranger = os.fork()
    if stranger == 0:
        signal.pause()
    processes.pids.append(stranger)
    monkeypatch.setattr(keeper_module, "start_time", lambda pid: start_time(pid) - 1)
    with fails(errno.ESRCH):
        processes.keeper.fetch(stranger)
