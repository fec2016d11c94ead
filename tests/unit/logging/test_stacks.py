"""Python stacks of a process on demand."""

from __future__ import annotations

import os
import signal
import time

from llloop.logging.stacks import Stacks
from tests.server_processes import wait_until


def test_a_process_tells_where_it_is_as_often_as_asked() -> None:
    stacks = Stacks("sleeper")
    ready, writer = os.pipe()

    def sleeps_deeply() -> None:
        stacks.answer_signals()
        os.write(writer, b"!")
        time.sleep(60)

    pid = os.fork()
    if pid == 0:
        try:
            sleeps_deeply()
        finally:
            os._exit(0)
    try:
        os.read(ready, 1)
        for _ in range(2):
            assert stacks.take() == ""
            os.kill(pid, signal.SIGUSR2)
            # The handler writes in pieces, and what comes while it is taken is lost: looked at first.
            assert wait_until(lambda: b"sleeps_deeply" in os.pread(stacks._fd, 65536, 0))
            time.sleep(0.1)
            assert "sleeps_deeply" in stacks.take()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for fd in (ready, writer):
            os.close(fd)
        stacks.close()


def test_one_s_own() -> None:
    stacks = Stacks("self")
    stacks.dump()
    assert "test_one_s_own" in stacks.take()
    stacks.close()
