"""Process descriptors (pidfd_open(2)). A process id alone is unsafe: the kernel may give it to a new process."""

from __future__ import annotations

import os
from pathlib import Path

from llloop.linux.syscalls import is_readable


def start_time(pid: int) -> int:
    """Return a process's start time in clock ticks since boot (proc_pid_stat(5)), or 0 if there is no such process.

    Process id and start time together identify a process.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])


def open_process(pid: int, started: int) -> int:
    """Return a pidfd of the process with that id and start time.

    Args:
        pid: its process id.
        started: its `start_time`.

    Raises:
        ProcessLookupError: the process has ended, even if another process has its id now.
    """
    pidfd = os.pidfd_open(pid)
    # While the process behind the pidfd runs, no other has its id. So the start time that was read is its own.
    if start_time(pid) == started and not is_readable(pidfd):
        return pidfd
    os.close(pidfd)
    raise ProcessLookupError(f"process id {pid} belongs to another process now")
