"""Stack dumps on SIGUSR2 and on a call."""

from __future__ import annotations

import os
import signal
import time

from llloop.logging.stacks import Stacks
from tests.server_processes import wait_until


def test_process_dumps_its_stacks_on_each_signal() -> None:
    stacks = Stacks("sleeper")
    ready, writer = os.pipe()

    def sleep_forever() -> None:
        stacks.answer_signals()
        os.write(writer, b"!")
        time.sleep(60)

    pid = os.fork()
    if pid == 0:
        try:
            sleep_forever()
        finally:
            os._exit(0)
    try:
        os.read(ready, 1)
        for _ in range(2):
            assert stacks.take() == ""
            os.kill(pid, signal.SIGUSR2)
            # The handler writes in several pieces. Wait until the dump is there before `take` removes it.
            assert wait_until(lambda: b"sleep_forever" in os.pread(stacks._fd, 65536, 0))
            time.sleep(0.1)
            assert "sleep_forever" in stacks.take()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for fd in (ready, writer):
            os.close(fd)
        stacks.close()


def test_process_dumps_its_own_stacks() -> None:
    stacks = Stacks("self")
    stacks.dump()
    assert "test_process_dumps_its_own_stacks" in stacks.take()
    stacks.close()
