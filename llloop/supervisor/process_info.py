"""What /proc tells of a process."""

from __future__ import annotations

import os
from pathlib import Path

# States in which a process answers nothing: stopped, traced, dead.
SILENT = frozenset("TtZXx")


def _stat(pid: int | None) -> list[str]:
    """Return the fields of proc_pid_stat(5) from the state on, none if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace") if pid else ""
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def process_state(pid: int | None) -> str | None:
    """Return a process's state letter, or None if there is no such process."""
    return next(iter(_stat(pid)), None)


def cpu_seconds(pid: int | None) -> float:
    """Return how long a process has kept CPUs busy, in user mode and in the kernel."""
    return sum(int(ticks) for ticks in _stat(pid)[11:13]) / os.sysconf("SC_CLK_TCK")


def open_files(pid: int | None) -> int:
    """Return how many descriptors a process has open, 0 if that cannot be seen."""
    if pid is None:
        return 0
    try:
        # The directory's size is their number since Linux 6.2; counting them would take long where there are many.
        return os.stat(f"/proc/{pid}/fd").st_size or len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0
