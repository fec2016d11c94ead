"""What each process is doing: its Python stacks, on demand (SIGUSR2).

faulthandler writes from the signal handler itself, so a process that hangs in Python or in a system call that a
signal can interrupt still answers. It writes to memory, from where the supervisor puts it into the log as
one message: several processes at once would mix their lines, and the log file may have been opened anew meanwhile.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import signal

# How long the processes are given to write, in seconds.
PATIENCE = 0.3


class Stacks:
    """The place for one process's stacks, made before it is forked.

    Args:
        name: the process's role.
    """

    def __init__(self, name: str) -> None:
        self._fd = os.memfd_create(f"{name}-stacks", os.MFD_CLOEXEC)
        # Written after the end, wherever that is: it is emptied between two dumps.
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) | os.O_APPEND)

    def answer_signals(self) -> None:
        """Have SIGUSR2 dump the calling process's stacks here from now on."""
        faulthandler.register(signal.SIGUSR2, file=self._fd, all_threads=True)

    def dump(self) -> None:
        """Dump the calling process's stacks here."""
        faulthandler.dump_traceback(file=self._fd, all_threads=True)

    def take(self) -> str:
        """Return what has been dumped since the last call."""
        text = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        os.ftruncate(self._fd, 0)
        return text.decode(errors="replace").strip()

    def close(self) -> None:
        os.close(self._fd)
