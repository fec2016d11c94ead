"""Python stack dumps of each process on demand (SIGUSR2).

faulthandler writes the dump in the signal handler. So a process also answers if it hangs in Python or in an
interruptible system call. It writes to a memfd, and the supervisor logs the content as one message. If the processes
wrote to the log directly, their lines would mix, and the log file may have been reopened meanwhile.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import signal

# How long the supervisor waits for the dumps, in seconds.
DUMP_TIME = 0.3


class Stacks:
    """The memfd for one process's stack dumps. Create it before the process is forked.

    Args:
        name: the process's role.
    """

    def __init__(self, name: str) -> None:
        self._fd = os.memfd_create(f"{name}-stacks", os.MFD_CLOEXEC)
        # O_APPEND, because `take` truncates the memfd between two dumps.
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) | os.O_APPEND)

    def answer_signals(self) -> None:
        """Make SIGUSR2 dump the calling process's stacks into this memfd."""
        faulthandler.register(signal.SIGUSR2, file=self._fd, all_threads=True)

    def dump(self) -> None:
        """Dump the calling process's stacks into this memfd."""
        faulthandler.dump_traceback(file=self._fd, all_threads=True)

    def take(self) -> str:
        """Return the dumps since the last call, and remove them."""
        text = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        os.ftruncate(self._fd, 0)
        return text.decode(errors="replace").strip()

    def close(self) -> None:
        os.close(self._fd)
