"""Stack dumps on SIGUSR2 and on a call."""

from __future__ import annotations

import os
import signal
import time

from llloop.logging.stacks import DUMP_TIME, Stacks
from tests.server_processes import wait_until


def test_process_dumps_its_stacks_on_each_signal() -> None:
    stacks = Stacks("sleeper")
    ready, writer = os.pipe()

    def sleep_forever() -> None:
        stacks.answer_signals()
        os.write(writer, b"!")
        time.sleep(60)

    def dump() -> str:
        os.kill(pid, signal.SIGUSR2)
        time.sleep(DUMP_TIME)
        return stacks.take()

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
            # The handler writes in several pieces, and `take` may come between them.
            assert wait_until(lambda: "sleep_forever" in dump())
            time.sleep(DUMP_TIME)
            stacks.take()
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
