"""Child processes: start, signals, deadlines, exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llloop.linux.process import Process, exit_in_words, fork
from llloop.linux.syscalls import is_readable

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
TIMEOUT = 10.0  # seconds


def sleep() -> None:
    time.sleep(60)


def children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


@pytest.mark.parametrize(
    ("target", "code"),
    [
        (lambda: None, 0),
        (lambda: 7, 7),
        (lambda: sys.exit(3), 3),
        (lambda: sys.exit(), 0),
        (lambda: sys.exit("a message"), 1),
        (lambda: 1 // 0, 1),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), -signal.SIGTERM),
    ],
)
def test_exit_code(target: Callable[[], int | None], code: int) -> None:
    process = fork(target, "test")
    assert process.wait(TIMEOUT) == code
    assert process.exit_code == code
    assert process.wait(0) == code, "it can be asked again"


def test_wait_has_a_deadline() -> None:
    process = fork(sleep, "test")
    assert process.wait(0.01) is None
    assert process.is_alive()
    assert process.end(TIMEOUT)
    assert not process.is_alive()
    assert process.exit_code == -signal.SIGKILL


def test_signals_after_its_end_do_nothing() -> None:
    process = fork(lambda: None, "test")
    assert is_readable(process.pidfd, TIMEOUT)
    process.signal(signal.SIGKILL)
    assert process.wait() == 0
    process.signal(signal.SIGKILL)
    assert process.end(TIMEOUT)


def test_nothing_remains_without_free_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise two processes with one role could run."""

    def no_descriptors(pid: int, flags: int = 0) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = children()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", no_descriptors)
        with pytest.raises(OSError):
            fork(sleep, "test")
    assert children() == before


def test_descriptors_do_not_pile_up() -> None:
    before = os.listdir("/proc/self/fd")
    fork(lambda: None, "test").wait()
    fork(sleep, "test").end(TIMEOUT)
    assert os.listdir("/proc/self/fd") == before


def test_a_child_that_another_part_of_the_program_has_reaped() -> None:
    process = fork(lambda: None, "test")
    os.waitpid(process.pid, 0)
    assert process.wait(TIMEOUT) == 255


def test_a_child_cannot_read_standard_input() -> None:
    assert fork(lambda: len(os.read(0, 1)), "test").wait(TIMEOUT) == 0


def test_words() -> None:
    assert exit_in_words(-9) == "was killed by signal 9"
    assert exit_in_words(1) == "ended with exit code 1"


def test_a_process_forked_elsewhere() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(5)
    assert Process(pid).wait() == 5
