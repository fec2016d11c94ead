"""Information about a process from proc(5): state, CPU time, number of descriptors."""

from __future__ import annotations

import os
from pathlib import Path

# States in which a process does not answer: stopped, traced, dead.
SILENT = frozenset("TtZXx")


def _stat(pid: int | None) -> list[str]:
    """Return the fields of proc_pid_stat(5) from the state on; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace") if pid else ""
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def process_state(pid: int | None) -> str | None:
    """Return a process's state letter, or None if there is no such process."""
    return next(iter(_stat(pid)), None)


def cpu_seconds(pid: int | None) -> float:
    """Return the CPU time of a process in user mode and in the kernel, in seconds."""
    return sum(int(ticks) for ticks in _stat(pid)[11:13]) / os.sysconf("SC_CLK_TCK")


def open_files(pid: int | None) -> int:
    """Return the number of open descriptors of a process, 0 if it is not visible."""
    if pid is None:
        return 0
    try:
        # Since Linux 6.2, the directory's size is their number. Counting many descriptors would take long.
        return os.stat(f"/proc/{pid}/fd").st_size or len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0
