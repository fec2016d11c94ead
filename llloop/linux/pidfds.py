"""Processes by descriptor (pidfd_open(2)): a process id alone may be another process's by the time that it is used."""

from __future__ import annotations

import os
from pathlib import Path

from llloop.linux.syscalls import is_readable


def start_time(pid: int) -> int:
    """Return when a process was started, in clock ticks since the machine was (proc_pid_stat(5)); 0 if there is none.

    Process id and start time together are one process only.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])


def open_process(pid: int, started: int) -> int:
    """Return a pidfd of the process that has that id and was started at that time.

    Args:
        pid: its process id.
        started: what `start_time` said of it.

    Raises:
        ProcessLookupError: it has ended, whoever has its process id now.
    """
    pidfd = os.pidfd_open(pid)
    # A process that has not ended still has its number, so the start time was that of the process behind the pidfd.
    if start_time(pid) == started and not is_readable(pidfd):
        return pidfd
    os.close(pidfd)
    raise ProcessLookupError(f"process {pid} is another than the one that was meant")
